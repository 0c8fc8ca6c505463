"""The command ``retrieval belief-truth``: does belief lie on what the captions name, and what would the truth be worth?

    belief-truth.json    figures with 95 % intervals over images, and the recalls with another belief
               .md       the tables
               .png      images with their mask and maps, see truth_panel.py

Maps, each on the grid of visual tokens: the belief M; the ranks 1/sqrt(R); soft belief M + 1/sqrt(R), whichever mode
the model was trained with; the instruction's attention in its last layer; the gradient of the similarity of the image
and the mean of its captions with respect to the pixels. They are compared with chance, an even map, and with a bell
around the centre. model/localization.py has the three measures, interventions.py the other beliefs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from priorclip.common.files import write_bytes
from priorclip.common.masking import masked
from priorclip.data_shards import EvalBatches
from priorclip.model.attention_maps import attention_map, exact_copy, gradient_map, token_grid
from priorclip.model.bootstrap import interval, resample
from priorclip.model.localization import MEASURES, centre_map, measure_map
from priorclip.model.networks.two_towers import TwoTowers
from priorclip.model.pictures.belief_maps import soft_map
from priorclip.retrieval.commands import BeliefTruthConfig
from priorclip.retrieval.encoder import Encoder
from priorclip.retrieval.evaluate_export import write_report
from priorclip.retrieval.gallery import open_gallery, with_captions
from priorclip.retrieval.localization.interventions import recalls_of_beliefs
from priorclip.retrieval.localization.true_masks import TrueMasks
from priorclip.retrieval.localization.truth_panel import PanelRow, draw_panel

LABELS = {
    "chance": "chance",
    "centre": "centre of the image",
    "belief": "belief M",
    "ranks": "ranks, 1/sqrt(R)",
    "soft": "soft belief, M + 1/sqrt(R)",
    "attention": "attention of the instruction, last layer",
    "gradient": "gradient of the similarity",
}


class Measured(NamedTuple):
    """An image with its maps.

    Args:
        image: index in the gallery
        pixels: uint8 (3, S, S) as the model gets it
        maps: name -> (h, w) float64
    """

    image: int
    pixels: Tensor
    maps: dict[str, Tensor]


def measure_belief_truth(config: BeliefTruthConfig) -> dict[str, Any]:
    """Writes the files and returns the report.

    Returns:
        ``maps``: name -> measure -> mean in percent with its ``interval``; ``recalls``: belief -> the six recalls and
        their mean, with intervals, and ``less_own``, the difference of mean recall to the model's own belief;
        ``images`` and ``without_truth``, those whose mask is empty and that the maps' figures leave out
    Raises:
        OSError, ValueError: bad input; the message names the option, file or key
    """
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {folder} is a file: name a folder")
    gallery, _ = with_captions(
        open_gallery(config.data, config.images, config.split, config.limit), config.caption_field
    )
    masks = TrueMasks(gallery, masked(str(config.data)), config.max_pixels)
    masks.square(0)  # shards without masks are refused before anything is encoded
    encoder = Encoder.load(config.model, config.device, config.precision)
    encoder.require_pictures("belief-truth")
    batches = encoder.batches(gallery, config, config.caption_field)
    texts = encoder.texts(batches)
    figures: dict[str, list[list[float]]] = {}
    shown = set(np.random.default_rng(config.seed).permutation(batches.image_count)[: config.count].tolist())
    rows: list[PanelRow] = []
    grid, empty, done = (0, 0), [], 0
    for measured in maps_of_images(encoder, batches, mean_captions(texts, batches), config.batch_size):
        grid = (measured.maps["centre"].shape[0], measured.maps["centre"].shape[1])
        shares = masks.shares(measured.image, grid)
        done += 1
        if not shares.sum() > 0:
            empty.append(gallery.source.name(measured.image)[1])
            continue
        found = {name: measure_map(each, shares) for name, each in measured.maps.items()}
        for name, measures in found.items():
            figures.setdefault(name, []).append([measures[measure] for measure in MEASURES])
        if measured.image in shown:
            key = gallery.source.name(measured.image)[1]
            caption = gallery.source.captions(measured.image, config.caption_field)[0]
            precision = {name: measures["average_precision"] for name, measures in found.items()}
            rows.append(PanelRow(key, caption, measured.pixels, masks.square(measured.image), measured.maps, precision))
    if not figures:
        raise ValueError(f"--data {masks.data}: no image can be used, or no mask shows anything")
    report: dict[str, Any] = {
        "model": str(config.model),
        "data": masks.data,
        "belief": encoder.model.config.belief.mode if encoder.model.has_belief else None,
        "grid": list(grid),
        "images": done - len(empty),
        "without_truth": empty,
        "maps": {name: summarize(np.array(rows_of), config) for name, rows_of in figures.items()},
    }
    if encoder.model.has_belief and config.chosen:
        report["recalls"] = recalls_of_beliefs(config, encoder, batches, texts, masks, grid)
    folder.mkdir(parents=True, exist_ok=True)
    draw_panel(folder / "belief-truth.png", rows)
    write_bytes(folder / "belief-truth.md", (belief_truth_table(report) + "\n").encode())
    write_report(folder / "belief-truth.json", report)
    return report


def mean_captions(texts: Tensor, batches: EvalBatches) -> Tensor:
    """Returns the normalised mean of the captions of each image, (I, d)."""
    sums = torch.zeros(batches.image_count, texts.shape[1]).index_add_(0, torch.as_tensor(batches.text_image), texts)
    return normalize(sums, dim=-1)


def maps_of_images(encoder: Encoder, batches: EvalBatches, texts: Tensor, batch_size: int) -> Iterator[Measured]:
    """Yields each image that can be read, with its maps, which are computed in float64."""
    exact = exact_copy(encoder.model)
    for batch in batches.images("maps"):
        real = batch["index"] >= 0
        images, index = batch["images"][real], batch["index"][real]
        if not len(index):
            continue
        maps = maps_of_batch(exact, images.to(encoder.device), texts[index].to(encoder.device))
        for row, image in enumerate(index.tolist()):
            yield Measured(image, images[row], {name: each[row] for name, each in maps.items()})


def maps_of_batch(model: TwoTowers, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Returns the maps (B, h, w) float64 on the CPU that the model has, by the names of LABELS.

    Args:
        model: an `exact_copy`
        images: uint8 (B, 3, S, S)
        texts: the feature that each image is compared with, (B, d)
    Raises:
        ValueError: a map is not finite, because the weights are damaged
    """
    with torch.no_grad():
        grid = token_grid(model, images)
        maps = {
            "chance": torch.ones(len(images), *grid, dtype=torch.float64),
            "centre": centre_map(grid).expand(len(images), -1, -1),
        }
        if model.has_belief:
            belief = model.belief_map(images).cpu()
            soft = torch.stack([soft_map(each) for each in belief])
            maps |= {"belief": belief, "ranks": soft - belief, "soft": soft}
        attention = attention_map(model, images)
    if attention is not None:
        maps["attention"] = attention.cpu()
    maps["gradient"] = gradient_map(model, images, texts, grid).cpu()
    for name, each in maps.items():
        if not each.isfinite().all():
            raise ValueError(f"the model's {LABELS[name]} is not finite: its weights are damaged")
    return maps


def summarize(values: NDArray[np.float64], config: BeliefTruthConfig) -> dict[str, Any]:
    """Returns the mean of each measure over the images, (I, measures), in percent, with its interval."""
    found: dict[str, Any] = {
        name: {"mean": float(100 * mean)} for name, mean in zip(MEASURES, values.mean(0), strict=True)
    }
    if config.bootstrap:
        draws = resample(values.T, np.ones_like(values.T), config.bootstrap, config.seed)
        for name, drawn in zip(MEASURES, draws.T, strict=True):
            found[name]["interval"] = list(interval(drawn))
    return found


def belief_truth_table(report: dict[str, Any]) -> str:
    """Returns the Markdown tables of a report."""
    lines = [
        f"| {report['images']} images, grid {report['grid'][0]} x {report['grid'][1]}, % | pointing game "
        "| average precision | energy on the thing |",
        "|---|---:|---:|---:|",
    ]
    for name, label in LABELS.items():
        if name in report["maps"]:
            lines.append(f"| {label} | {' | '.join(cell(report['maps'][name][each]) for each in MEASURES)} |")
    if recalls := report.get("recalls"):
        lines += ["", "| belief | mean recall | less the model's own |", "|---|---:|---:|"]
        for row in recalls.values():
            less = cell(row["less_own"], "+.1f") if "less_own" in row else ""
            lines.append(f"| {row['label']} | {cell(row['mean_recall'])} | {less} |")
    return "\n".join(lines)


def cell(figure: dict[str, Any], form: str = ".1f") -> str:
    """Returns ``22.1 [20.2, 24.0]``."""
    bounds = f" [{', '.join(f'{bound:.1f}' for bound in figure['interval'])}]" if "interval" in figure else ""
    return f"{figure['mean']:{form}}{bounds}"
