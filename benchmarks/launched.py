"""Starts real ranks on this machine for a benchmark: CPU processes with gloo, one thread each.

ask_ranks("benchmarks.rank_memory", {"preset": "priorclip-tiny", "runs": [...]}, ranks=2)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def ask_ranks(module: str, request: dict[str, Any], ranks: int) -> Any:
    """Returns the answer of rank 0 of the module, which reads REQUEST.json and writes REQUEST.json.measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request))
        command = [sys.executable, "-m", "cluster", "launch", "--nproc", str(ranks), "--", module, str(path)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return json.loads(path.with_suffix(".json.measured").read_text())
