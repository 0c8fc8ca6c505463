"""``deepspeed``, which ends with an error where what it started was killed: DeepSpeed's own runner then ends with 0.

    python -m priorclip.cluster.launch.runner --hostfile hosts --launcher pdsh --module pretrain --config c.yaml

Of pdsh, mpirun or srun, DeepSpeed hands on exit codes above 0, and a process that a signal ended has one below.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

STARTED: list[subprocess.Popen[Any]] = []


class Started(subprocess.Popen[Any]):
    """A process that is remembered, so that how it ended can be asked afterwards."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        STARTED.append(self)


def main() -> int:
    """DeepSpeed's runner on this process's arguments; 128 + N where signal N ended what it started."""
    subprocess.Popen = Started  # type: ignore[misc]
    from deepspeed.launcher import runner

    runner.main()
    for process in STARTED:
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            words: Any = process.args
            program = words if isinstance(words, str) else words[0]
            print(f"{program} (process {process.pid}) was ended by {name}", file=sys.stderr)
            return 128 - process.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
