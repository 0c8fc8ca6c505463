"""Draws the hardest confusions as one picture: the wrong answers of which a model is most sure.

    draw_retrieval_confusions("confusions.png", gallery, features)      # a row: an image, and the image it is taken for
    draw_scene_confusions("confusions.png", gallery, samples, ...)      # a row: one scene taken for another

A contact sheet is a list of rows. Each row is a heading and some pictures with a few lines of text below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.model.pictures.retrieval_pictures import fit_text, load_font
from priorclip.retrieval.features import Features
from priorclip.retrieval.gallery import Gallery
from priorclip.retrieval.recall_report import hardest_negatives

SIDE, GAP, LINE = 176, 14, 15  # pixels
ROWS, ACROSS = 12, 6
HEADING, BELOW = 2, 4  # lines above the pictures of a row, and below each
LONGEST = 40  # letters of a name in a heading; the end of a longer name is kept
SURE = 1e-6  # a smaller margin is rounding in float32, for example of the same caption twice
INK, FAINT, WRONG, PAPER = "#202020", "#707070", "#b3261e", "#ffffff"


class Cell(NamedTuple):
    """A picture with a text below. ``wrong`` draws a red frame."""

    sample: int
    text: str
    wrong: bool = False


class Row(NamedTuple):
    heading: str
    cells: Sequence[Cell]


def draw_retrieval_confusions(
    path: str, gallery: Gallery, features: Features, rows: int = ROWS
) -> list[dict[str, Any]]:
    """Draws the images whose wrong caption is most similar, compared with their best own caption.

    Returns a row for each: ``image`` and ``taken_for`` (keys), ``caption`` (the wrong one), and ``margin``, the
    difference of the two similarities.
    """
    wrong, alike, own = hardest_negatives(features)
    margin = torch.where(own.isnan() | (alike == -torch.inf), -torch.inf, alike - own)
    order = [image for image in margin.argsort(descending=True, stable=True)[:rows].tolist() if margin[image] > SURE]
    sheet: list[Row] = []
    found: list[dict[str, Any]] = []
    for image in order:
        text = int(wrong[image])
        other = int(features.owner[text])
        own_texts = (features.owner == image).nonzero().flatten()
        best = int(own_texts[(features.texts[own_texts] @ features.images[image]).argmax()])
        here, there = (int(features.samples[place]) for place in (image, other))
        keys = [gallery.source.name(sample)[1] for sample in (here, there)]
        sheet.append(
            Row(
                f"{short(keys[0])} is closer to a caption of {short(keys[1])}, by {margin[image]:.3f}",
                [
                    Cell(here, f"{own[image]:.3f} {features.captions[best]}"),
                    Cell(there, f"{alike[image]:.3f} {features.captions[text]}", wrong=True),
                ],
            )
        )
        row = {"image": keys[0], "taken_for": keys[1], "caption": features.captions[text]}
        found.append({**row, "margin": round(float(margin[image]), 4)})
    draw_sheet(path, gallery, sheet, across=2, columns=3)
    return found


def draw_scene_confusions(
    path: str,
    gallery: Gallery,
    samples: NDArray[np.int64],
    wanted: NDArray[np.int64],
    predicted: NDArray[np.int64],
    classes: list[str],
    confusions: Sequence[Sequence[Any]],
) -> None:
    """Draws the pairs of scenes that are confused most often, with pictures of each.

    Args:
        path: PNG to write
        gallery: source of the pictures
        samples, wanted, predicted: (I,) index in the gallery, class and predicted class of each image
        classes: names
        confusions: [class, predicted class, number of images], as in a classification report
    """
    sheet = []
    for name, other, count in list(confusions)[:ROWS]:
        chosen = samples[(wanted == classes.index(name)) & (predicted == classes.index(other))][:ACROSS]
        names = [gallery.source.name(int(sample))[1].rpartition("/")[2] for sample in chosen]
        cells = [Cell(int(sample), text, wrong=True) for sample, text in zip(chosen, names, strict=True)]
        sheet.append(Row(f"{short(name)}, taken for {short(other)}: {count}", cells))
    draw_sheet(path, gallery, sheet, across=ACROSS, columns=1)


def short(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def draw_sheet(path: str, gallery: Gallery, sheet: Sequence[Row], across: int, columns: int) -> None:
    """Writes the PNG: rows of ``across`` pictures, in ``columns`` columns."""
    wide = across * (SIDE + GAP) + GAP
    high = SIDE + (HEADING + BELOW) * LINE + 2 * GAP
    down = max(1, -(-len(sheet) // columns))
    page = Image.new("RGB", (wide * min(columns, max(1, len(sheet))), high * down + GAP), PAPER)
    pen, font = ImageDraw.Draw(page), load_font(11)
    if not sheet:
        pen.text((GAP, GAP), "no confusions", INK, font)
    for place, row in enumerate(sheet):
        left, top = wide * (place % columns) + GAP, high * (place // columns) + GAP
        heading = fit_text(row.heading, font, wide - 2 * GAP, HEADING)
        for at, line in enumerate(heading):
            pen.text((left, top + (HEADING - len(heading) + at) * LINE), line, INK, font)
        for number, cell in enumerate(row.cells):
            x, y = left + number * (SIDE + GAP), top + HEADING * LINE + 4
            page.paste(picture(gallery, cell.sample), (x, y))
            if cell.wrong:
                pen.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=WRONG, width=2)
            for at, line in enumerate(fit_text(cell.text, font, SIDE, BELOW)):
                pen.text((x, y + SIDE + 2 + at * LINE), line, FAINT, font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path, "PNG")


def picture(gallery: Gallery, sample: int) -> Image.Image:
    """Returns the centred square of an image, or a grey one if the image can no longer be read."""
    try:
        pixels = eval_transform(gallery.source.read(sample).image, SIDE)
    except BadSample:
        return Image.new("RGB", (SIDE, SIDE), "#cccccc")
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
