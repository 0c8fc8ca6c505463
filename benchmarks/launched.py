"""Real ranks of this machine that a benchmark asks for figures: CPU processes under gloo, one thread each.

asked("benchmarks.rank_memory", {"preset": "priorclip-tiny", "runs": [...]}, ranks=2)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def asked(module: str, request: dict[str, Any], ranks: int) -> Any:
    """What rank 0 of the module answers: it reads REQUEST.json and writes REQUEST.json.measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request))
        command = [sys.executable, "-m", "cluster", "launch", "--nproc", str(ranks), "--", module, str(path)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return json.loads(path.with_suffix(".json.measured").read_text())
