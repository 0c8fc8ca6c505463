"""Several toy runs one after another on the same ranks, because importing DeepSpeed takes longer than a run.

    python -m cluster launch --nproc 2 -- tests.toy_runs RUNS.json

RUNS.json is a list of argument lists of toy_run. Rank 0 writes the exit code of each run, or the message of its error,
into RUNS.json.ended.
"""

from __future__ import annotations

import json
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


if __name__ == "__main__":
    run_all(Path(without_local_rank(sys.argv[1:])[0]))
