"""Several toy runs one after another on the same ranks, because importing DeepSpeed takes longer than a run.

    python -m cluster launch --nproc 2 -- tests.toy_runs RUNS.json

RUNS.json is a list of argument lists of toy_run. Rank 0 writes the exit code of each run, or the message of its error,
into RUNS.json.ended. If the last run ended well, gloo's threads must have ended before the interpreter does: one that
drops a tensor later would abort the process. Then the exit code is 3.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from priorclip.common.options import without_local_rank
from priorclip.training.checkpoints.writer import CheckpointError
from tests.toy_run import main


def run_all(path: Path) -> None:
    ended: list[int | str] = []
    for argv in json.loads(path.read_text()):
        try:
            main(argv)
            ended.append(0)
        except SystemExit as stop:
            ended.append(int(stop.code or 0))
        except (OSError, ValueError, FloatingPointError, CheckpointError) as error:
            ended.append(str(error))
    if dist.get_rank() == 0:
        path.with_suffix(".json.ended").write_text(json.dumps(ended))


def end_with_3_beside_gloo() -> None:
    threads = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    alive = [name for name in threads if "gloo" in name]
    if alive and not dist.is_initialized():
        print(f"threads of gloo at the end of the process: {alive}", flush=True)
        os._exit(3)


if __name__ == "__main__":
    atexit.register(end_with_3_beside_gloo)  # Python calls what was registered first at last
    run_all(Path(without_local_rank(sys.argv[1:])[0]))
