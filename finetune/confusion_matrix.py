"""Accuracy and confusion matrix of a scene classifier, as figures, JSON and a picture.

counts = confusion(engine, batches, classes, device)       # int64 (C, C): row the label, column the prediction
figures_of(counts)                                         # {"accuracy": 96.9, "mean_class_accuracy": 96.9}
write_confusion(counts, classes, folder)                   # confusion.json, confusion.png
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from priorclip.common.printable import figure_text
from priorclip.data_shards import EvalBatches


def confusion(forward: Callable[[Tensor], Tensor], batches: EvalBatches, classes: int, device: torch.device) -> Tensor:
    """Counts label and prediction over the labelled held-out images of all ranks. Returns int64 (C, C)."""
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for batch in batches.images():
        predicted = forward(batch["images"].to(device)).argmax(dim=1)
        labels = batch["labels"].to(device)
        counted = (batch["index"].to(device) >= 0) & (labels >= 0)
        pairs = labels[counted] * classes + predicted[counted]
        counts += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    dist.all_reduce(counts)
    return counts.cpu()


def figures_of(counts: Tensor) -> dict[str, float]:
    """Returns top-1 accuracy and the mean of the classes' accuracies, in percent."""
    total, right, of = counts.sum().item(), counts.diagonal(), counts.sum(1)
    if not total:
        return {"accuracy": float("nan"), "mean_class_accuracy": float("nan")}
    there = of > 0
    own = (right[there] / of[there]).double().mean().item()
    return {"accuracy": 100 * right.sum().item() / total, "mean_class_accuracy": 100 * own}


def write_confusion(counts: Tensor, classes: list[str], folder: Path) -> None:
    """Writes ``confusion.json`` (counts, accuracy by class, the most confused pairs) and ``confusion.png``."""
    of = counts.sum(1)
    wrong = [
        {"label": classes[row], "taken_for": classes[column], "images": int(counts[row, column])}
        for row, column in counts.nonzero().tolist()
        if row != column
    ]
    record = {
        **figures_of(counts), "images": int(counts.sum()), "classes": classes, "counts": counts.tolist(),
        "class_accuracy": {
            name: 100 * counts[row, row].item() / of[row].item() if of[row] else None
            for row, name in enumerate(classes)
        },
        "confused": sorted(wrong, key=lambda pair: -pair["images"]),
    }  # fmt: skip
    (folder / "confusion.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(counts, classes, folder / "confusion.png")


def draw(counts: Tensor, classes: list[str], path: Path) -> None:
    """Draws the matrix: colours are shares of each row, numbers are counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    names = [figure_text(name) for name in classes]
    side = 0.32 * len(classes) + max(2.5, 1 + 0.06 * max(map(len, names)))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), names, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title(f"{figures_of(counts)['accuracy']:.1f} % of {int(counts.sum())} images")
    figure.savefig(path, dpi=110)
