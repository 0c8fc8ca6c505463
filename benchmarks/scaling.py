"""Compares the simulation with this machine: calibrated on one rank and gloo's collectives, it predicts steps.

    python -m benchmarks.scaling [--preset priorclip-tiny] [--stages 0 2 3] [--batch 16] [--ranks 1 2 4]

Three measurements are made for the simulation, none of them a step of several ranks:

    compute       steps of one rank at 0.5 and 1.5 times the batch: a line for each ZeRO stage
    sharing       forward and backward passes of two ranks at once, without communication, divided by those of one:
                  the slowdown by shared cores
    network       all-reduce, all-gather and reduce-scatter of two ranks by size: a bandwidth and a latency

Then steps of all ranks are measured and printed with the prediction. More ranks than cores share the cores, also in
collectives, which are memory copies here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.launched import ask_ranks
from priorclip.cluster.plan.memory import BYTES, PERSISTENT
from priorclip.cluster.plan.model_table import ModelTable, load_table
from priorclip.cluster.plan.network import Network
from priorclip.cluster.plan.step_time import Work, step_time

SIZES = [1 << power for power in range(12, 26, 2)]  # bytes: 4 KiB to 16 MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="priorclip-tiny")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--batch", type=int, default=16, help="batch per rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    table = load_table(options.preset, "fp32")
    lines = calibrated(options)
    pair = ask_ranks("benchmarks.rank_speed", request(options, 2, sizes=SIZES, alone=options.batch), 2)
    alone = ask_ranks("benchmarks.rank_speed", {"preset": options.preset, "alone": options.batch}, 1)
    sharing = pair["alone"] / alone["alone"]
    network, errors = fitted(pair["collectives"])
    print(f"two ranks at once need {sharing:.2f} times as long as one; collectives of two ranks:"
          f" {network.intra_gbytes:.2f} GB/s and {network.intra_microseconds:.0f} us a hop, off by"
          f" {errors:.0%} (median over sizes)\n")  # fmt: skip
    print("| ZeRO | ranks | predicted, ms | measured, ms | error |\n" + "|---:" * 5 + "|")
    rows = []
    for ranks in options.ranks:
        found = pair if ranks == 2 else ask_ranks("benchmarks.rank_speed", request(options, ranks), ranks)
        for record in found["steps"]:
            seconds = statistics.median(record["seconds"])
            work = work_of(table, lines[record["zero"]], int(record["zero"]), sharing if ranks > 1 else 1.0)
            expected = step_time(replace(work, cores=cores), network, ranks, options.batch).seconds
            rows.append({"zero": record["zero"], "ranks": ranks, "predicted": expected, "measured": seconds})
            print(f"| {record['zero']} | {ranks} | {1e3 * expected:.0f} | {1e3 * seconds:.0f} |"
                  f" {expected / seconds - 1:+.0%} |", flush=True)  # fmt: skip
    if options.output:
        found = {"sharing": sharing, "network": asdict(network), "collectives": pair["collectives"], "steps": rows}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def request(options: argparse.Namespace, ranks: int, **more: Any) -> dict[str, Any]:
    steps = [{"zero": str(stage), "batch": options.batch} for stage in options.stages]
    return {"preset": options.preset, "steps": steps, **more}


def calibrated(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Returns (seconds per step, seconds per sample) of one rank, by stage."""
    few, many = options.batch // 2, options.batch * 3 // 2
    steps = [{"zero": str(stage), "batch": batch} for stage in options.stages for batch in (few, many)]
    measured = ask_ranks("benchmarks.rank_speed", {"preset": options.preset, "steps": steps}, 1)["steps"]
    found = {}
    for low, high in zip(measured[::2], measured[1::2], strict=True):
        short, long = statistics.median(low["seconds"]), statistics.median(high["seconds"])
        sample = (long - short) / (many - few)
        found[low["zero"]] = (short - few * sample, sample)
    return found


def fitted(collectives: dict[str, dict[str, float]]) -> tuple[Network, float]:
    """Fits a network to the seconds of the collectives of two ranks by bytes. Returns it and its median error.

    With two ranks one half takes size / 2 / bandwidth + one hop, an all-reduce twice that. Relative least squares.
    """
    rows, seconds = [], []
    for name, times in collectives.items():
        halves = 2 if name == "all_reduce" else 1
        for size, taken in times.items():
            rows.append((halves * float(size) / 2, halves))
            seconds.append(taken)
    weight = 1 / np.array(seconds)
    slope, hop = np.linalg.lstsq(np.array(rows) * weight[:, None], np.ones(len(rows)), rcond=None)[0]
    network = Network(
        gpus_per_node=1 << 20, intra_gbytes=1e-9 / slope, inter_gbytes=1e-9 / slope,
        intra_microseconds=1e6 * max(0.0, hop), inter_microseconds=1e6 * max(0.0, hop),
    )  # fmt: skip
    errors = [abs(copies * slope + halves * hop - taken) / taken
              for (copies, halves), taken in zip(rows, seconds, strict=True)]  # fmt: skip
    return network, statistics.median(errors)


def work_of(table: ModelTable, line: tuple[float, float], zero: int, sharing: float) -> Work:
    fixed, sample = line
    return Work(
        seconds_a_sample=sharing * sample, seconds_a_step=sharing * fixed, trained=table.trained, frozen=table.frozen,
        bytes_a_parameter=BYTES["fp32"], width=table.width, zero=zero,
        persistent=len(table.persistent(PERSISTENT)), overlap=0.0, stragglers=0.0,
    )  # fmt: skip


if __name__ == "__main__":
    main()
