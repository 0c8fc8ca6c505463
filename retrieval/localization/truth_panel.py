"""Images with what their captions name, and with the maps of a model, one row an image.

    image | true mask | belief M | soft belief | attention | gradient

In the second column all but the main thing is dark. A map glows where it is high. A bright place on what the second
column shows is right. Below each map is its average precision, in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from priorclip.common.files import file_aside
from priorclip.model.pictures.belief_maps import paint_belief, paint_kept
from priorclip.model.pictures.retrieval_pictures import load_font
from priorclip.retrieval.confusion_sheets import FAINT, GAP, INK, LINE, PAPER, SIDE
from priorclip.retrieval.pictures.panel import write

COLUMNS = {
    "belief": "belief M",
    "soft": "soft: M + 1/sqrt(R)",
    "attention": "attention of the instruction",
    "gradient": "gradient of the similarity",
    "centre": "centre of the image",
}


class PanelRow(NamedTuple):
    """An image with its truth.

    Args:
        key: name of the image
        caption: one of its captions
        pixels: uint8 (3, S, S)
        mask: of the main thing, in 0..1, a square of any side
        maps: name -> (h, w)
        precision: name -> average precision of the map, 0 to 1
    """

    key: str
    caption: str
    pixels: Tensor
    mask: Tensor
    maps: dict[str, Tensor]
    precision: dict[str, float]


def draw_panel(path: Path, rows: Sequence[PanelRow]) -> None:
    """Writes the picture. Without rows it writes none."""
    if not rows:
        return
    shown = [name for name in COLUMNS if name in rows[0].maps]
    headings = ["image", "what captions name first", *(COLUMNS[name] for name in shown)]
    high = SIDE + 3 * LINE + GAP
    page = Image.new("RGB", (GAP + len(headings) * (SIDE + GAP), 2 * LINE + GAP + high * len(rows)), PAPER)
    pen, font = ImageDraw.Draw(page), load_font(11)
    for column, heading in enumerate(headings):
        write(pen, font, (GAP + column * (SIDE + GAP), GAP // 2), heading, INK, SIDE, 2)
    for number, row in enumerate(rows):
        top = 2 * LINE + GAP + number * high
        image = enlarged(row.pixels)
        drawn = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), paint_kept(image, row.mask > 0.5)]
        drawn += [paint_belief(image, row.maps[name] / row.maps[name].sum()) for name in shown]
        for column, each in enumerate(drawn):
            page.paste(each, (GAP + column * (SIDE + GAP), top))
        for column, name in enumerate(shown, start=2):
            text = f"average precision {100 * row.precision[name]:.0f} %"
            write(pen, font, (GAP + column * (SIDE + GAP), top + SIDE + 1), text, INK, SIDE, 1)
        write(pen, font, (GAP, top + SIDE + 1), row.key[-60:], FAINT, 2 * SIDE, 1)
        write(pen, font, (GAP, top + SIDE + LINE + 1), row.caption, INK, page.width - 2 * GAP, 2)
    with file_aside(path, durable=False) as aside:
        page.save(aside, "PNG")


def enlarged(pixels: Tensor) -> Tensor:
    """Resizes uint8 (3, S, S) to the side of the pictures."""
    resized = interpolate(pixels[None].float(), (SIDE, SIDE), mode="bicubic", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)
