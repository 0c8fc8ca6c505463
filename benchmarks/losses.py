"""Time and peak memory of the losses, forward and backward, by global batch, in one process.

    python benchmarks/losses.py [--sizes 512 2048 8192 32768] [--loop-until 512] [--output folder]

They are compared with open_clip's ClipLoss, which holds N x N logits, up to ``--full-until``, and with the attribution
loss as its authors published it, up to ``--loop-until``: a loop computes one centre per sample from a mask as large as
the features. Its gradient keeps each mask, N x N x d numbers: 21 GB at N = 2,048. For larger N its time is extrapolated
from the largest measured N by the square of the growth, marked with ~.

Each size runs in its own process. There the losses take turns, so that their ratios are reliable on a noisy machine;
times are medians. If other programs run, ``--threads 1 --clock cpu`` counts only the processor time of this process.
Memory is the peak above the memory before the forward pass, which contains the features, read from /proc (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 1 << 20
COLUMNS = ("N", "contrastive", "peak", "ClipLoss", "peak", "ours / ClipLoss", "attribution", "peak", "loop", "peak",
           "loop / ours")  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--width", type=int, default=512, help="width of the features")
    parser.add_argument("--classes", type=int, default=60, help="scene classes of the attribution loss")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each loss; one for N over 8,192")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="wall, or cpu: processor time of all threads, for a busy machine",
    )
    parser.add_argument("--full-until", type=int, default=8192, help="largest N of ClipLoss")
    parser.add_argument("--loop-until", type=int, default=512, help="largest N of the authors' loop")
    parser.add_argument("--output", type=Path, help="folder for losses.json and losses.md")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    rows: list[dict[str, Any]] = []
    print(
        f"{options.threads} threads, {options.clock} clock, d = {options.width}, {options.classes} classes\n\n{HEADER}",
        flush=True,
    )
    for size in sorted(options.sizes):
        rows.append(in_a_process(size))
        print(line(rows[-1], rows), flush=True)
        if options.output:
            write(options.output, rows, options)


def in_a_process(size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds and peak megabytes of each loss at one size."""
    import torch
    from open_clip.loss import ClipLoss

    from priorclip.model.losses.attribution import AttributionLoss
    from priorclip.model.losses.contrastive import ContrastiveLoss

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, size, options.width), dim=-1)
    image, text = (each.clone().requires_grad_() for each in features)
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    ids, labels = torch.arange(size), torch.randint(options.classes, (size,))
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "contrastive": lambda: ContrastiveLoss()(image, text, scale, ids),
        "attribution": lambda: AttributionLoss()(image, text, scale, labels),
    }
    if size <= options.full_until:
        losses["clip"] = lambda: ClipLoss()(image, text, scale)
    if size <= options.loop_until:
        losses["loop"] = lambda: attribution_loop(image, text, scale, labels)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for run in range(1 + (options.runs if size <= 8192 else 1)):
        if run == 0 and size > 8192:
            continue  # the first run warms up; it is short compared with a run of this size
        for name, loss in losses.items():
            if run == 0 and name == "loop":
                continue
            image.grad = text.grad = scale.grad = None
            found[name].append(timed(lambda loss=loss: loss().backward(), options.clock))
    row: dict[str, Any] = {"size": size}
    for name, values in found.items():
        kept = values[1:] if name != "loop" and len(values) > 1 else values
        row[name] = {
            "seconds": statistics.median(seconds for seconds, _ in kept),
            "peak_mb": max(peak for _, peak in kept),
        }
    return row


def timed(work: Callable[[], object], clock: str) -> tuple[float, float]:
    """Returns seconds, and peak megabytes above those resident before."""
    now = time.perf_counter if clock == "wall" else time.process_time
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    begun = now()
    work()
    return now() - begun, (resident("VmHWM") - before) / MB


def resident(name: str) -> int:
    """Returns the bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def attribution_loop(image: Any, text: Any, scale: Any, labels: Any) -> Any:
    """The published form: the centre of each sample's class, from a mask repeated over the features' width."""
    import torch
    from torch.nn.functional import cross_entropy

    alike = (labels[:, None] == labels).to(image.dtype)
    image_centres, text_centres = [], []
    for row in alike:
        mask = row[:, None].repeat(1, image.shape[1])
        image_centres.append((image * mask).sum(0) / row.sum())
        text_centres.append((text * mask).sum(0) / row.sum())
    own = torch.arange(len(labels))
    to_text = cross_entropy(scale * image @ torch.stack(text_centres).T, own)
    to_image = cross_entropy(scale * text @ torch.stack(image_centres).T, own)
    return (to_text + to_image) / 2


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Returns a row of the table."""
    contrastive, attribution = row["contrastive"], row["attribution"]
    cells = [f"{row['size']:,}", seconds(contrastive["seconds"]), megabytes(contrastive["peak_mb"])]
    if "clip" in row:
        clip = row["clip"]
        cells += [seconds(clip["seconds"]), megabytes(clip["peak_mb"]), f"{ratio(row, 'contrastive', 'clip'):.2f}"]
    else:
        cells += ["-"] * 3
    cells += [seconds(attribution["seconds"]), megabytes(attribution["peak_mb"])]
    measured = [other for other in rows if "loop" in other]
    if "loop" in row:
        cells += [seconds(row["loop"]["seconds"]), megabytes(row["loop"]["peak_mb"]),
                  f"{ratio(row, 'loop', 'attribution'):,.0f}"]  # fmt: skip
    elif measured:
        guess = measured[-1]["loop"]["seconds"] * (row["size"] / measured[-1]["size"]) ** 2
        cells += ["~" + seconds(guess), "-", f"~{guess / attribution['seconds']:,.0f}"]
    else:
        cells += ["-"] * 3
    return f"| {' | '.join(cells)} |"


def ratio(row: dict[str, Any], of: str, to: str) -> float:
    return row[of]["seconds"] / row[to]["seconds"]


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def megabytes(value: float) -> str:
    return f"{value:,.0f} MB"


def write(folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "threads": options.threads,
        "clock": options.clock,
        "width": options.width,
        "classes": options.classes,
        "rows": rows,
    }
    (folder / "losses.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "losses.md").write_text("\n".join([HEADER, *(line(row, rows) for row in rows)]) + "\n")


if __name__ == "__main__":
    main()
