"""The ``deepspeed`` command with a correct exit code: its own runner exits with 0 if a signal ends pdsh or srun.

    python -m priorclip.cluster.launch.deepspeed_runner --hostfile hosts --launcher pdsh --module pretrain ...

DeepSpeed passes on only exit codes above 0 of pdsh, mpirun or srun. A process that a signal ended has one below 0.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

from priorclip.common.output import say

STARTED: list[subprocess.Popen[Any]] = []


class RecordedPopen(subprocess.Popen[Any]):
    """A process that adds itself to STARTED, so that ``main`` can read its return code."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        STARTED.append(self)


def main() -> int:
    """Runs DeepSpeed's runner with this process's arguments. Returns 128 + N if signal N ended pdsh, mpirun or srun."""
    subprocess.Popen = RecordedPopen  # type: ignore[misc]
    from deepspeed.launcher import runner

    runner.main()
    for process in STARTED:
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            words: Any = process.args
            program = words if isinstance(words, str) else words[0]
            say(f"{program} (process {process.pid}) was ended by {name}", file=sys.stderr)
            return 128 - process.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
