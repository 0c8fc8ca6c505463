"""Operations and processor time of an optimizer step in bf16, with and without DeepSpeed's check of each parameter.

    python -m benchmarks.overflow_check [--preset priorclip-tiny] [--ranks 1] [--stages 1 2]

``check`` is DeepSpeed's default, which looks for infinities in each parameter's gradient. zero1.json and zero2.json
turn it off. Operations are those that torch dispatches in ``engine.step()``; both settings take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launched import ask_ranks
from benchmarks.rank_memory import synthetic_run
from priorclip.common.options import without_local_rank
from priorclip.training.config import EngineConfig
from priorclip.training.ranks.distributed import start


class Counter(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="priorclip-tiny")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    for stage in options.stages:
        request = {"preset": options.preset, "zero": str(stage), "runs": options.runs}
        found = ask_ranks("benchmarks.overflow_check", request, options.ranks)
        counts, seconds = ({name: each[place] for name, each in found.items()} for place in (0, 1))
        print(f"ZeRO {stage}: {counts['True']:,} operations with the check, {counts['False']:,} without; processor "
              f"time {seconds['True'] / seconds['False']:.2f} times", flush=True)  # fmt: skip


def on_rank(path: Path) -> None:
    request = json.loads(path.read_text())
    rank = start(EngineConfig(threads=1, timeout_minutes=30))
    wanted = {"zero": request["zero"], "batch": 2, "precision": "bf16"}
    engine, objective, batch = synthetic_run(request["preset"], wanted, rank, path.parent / "run")
    counts: dict[bool, int] = {}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(request["runs"] + 1):
        for checks in seconds:
            engine.optimizer.check_grad_overflow = checks
            engine.backward(objective.step(engine, batch)[0])
            begun = time.process_time()
            if turn:
                engine.step()
                seconds[checks].append(time.process_time() - begun)
            else:
                with Counter() as counter:
                    engine.step()
                counts[checks] = counter.count
    found = {str(checks): (counts[checks], statistics.median(times)) for checks, times in seconds.items()}
    if rank.is_first:
        path.with_suffix(".json.measured").write_text(json.dumps(found))


if __name__ == "__main__":
    words = without_local_rank(sys.argv[1:])
    if len(words) == 1 and words[0].endswith(".json"):
        on_rank(Path(words[0]))
    else:
        main()
