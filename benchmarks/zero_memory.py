"""Memory of ranks by ZeRO stage, measured with torch's allocator, and the estimate of the plan.

    python -m benchmarks.zero_memory [--preset priorclip-tiny] [--ranks 2 4] [--batch 16] [--bucket 200000]
    python -m benchmarks.zero_memory --preset priorclip-b32 --ranks 2 --batch 4 --bucket 5000000 --plain

Ranks are CPU processes with gloo and random weights; figures are MB of the largest rank. `theory of all three` is the
theory of parameters + gradients + optimizer; `most at once` is the peak of the second step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.launched import ask_ranks
from priorclip.cluster.plan.memory import Setting, estimate_memory
from priorclip.cluster.plan.model_table import ModelTable, load_table

STATES = ("parameters", "gradients", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="priorclip-tiny")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=16, help="batch per rank")
    parser.add_argument("--bucket", type=int, default=200_000, help="elements of DeepSpeed's buckets")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--plain", action="store_true", help="without the runs with gradient checkpointing")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    table = load_table(options.preset, options.precision)
    print("| ranks | ZeRO | recomputed | parameters | gradients | optimizer | theory of all three | most at once |"
          " estimate | off by |\n" + "|---:" * 10 + "|")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        for record in measure(options, ranks):
            rows.append(compared(record, table, options))
            print(line(rows[-1]), flush=True)
    print(f"\nlargest error of the estimate: {max(abs(row['error']) for row in rows):.1%}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


def measure(options: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    recomputed = (False,) if options.plain else (False, True)
    runs = [{"zero": str(stage), "batch": options.batch, "checkpointing": again, "bucket": options.bucket,
             "precision": options.precision}
            for stage in options.stages for again in recomputed]  # fmt: skip
    return ask_ranks("benchmarks.rank_memory", {"preset": options.preset, "runs": runs}, ranks)


def compared(record: dict[str, Any], table: ModelTable, options: argparse.Namespace) -> dict[str, Any]:
    setting = Setting(
        int(record["zero"]), record["world_size"], options.precision, record["batch"], record["batch"],
        checkpointing=record["checkpointing"], bucket=options.bucket, buckets=1,
    )  # fmt: skip
    memory = estimate_memory(table, setting)
    theory = sum(getattr(memory, name) for name in STATES)
    return {**record, "theory": theory, "estimate": memory.peak, "error": memory.peak / record["peak"] - 1}


def line(row: dict[str, Any]) -> str:
    sizes = [row[name] for name in (*STATES, "theory", "peak", "estimate")]
    first = (str(row["world_size"]), row["zero"], "yes" if row["checkpointing"] else "no")
    return f"| {' | '.join((*first, *(f'{size / 1e6:.1f}' for size in sizes)))} | {row['error']:+.1%} |"


if __name__ == "__main__":
    main()
