"""Pictures of a retrieval model's errors: hard negatives with their captions, and similarities by scene.

    found = hard_negatives(image_features, text_features, text_image, captions, count=8)
    hard_negatives_panel(pixels, found, captions).save("hard-negatives.png")
    similarity_panel(image_features[some] @ text_features[theirs].T, scenes).save("similarity.png")

A hard negative is an image for which a caption of another image scores above all of its own; the worst come first. In
the similarity matrix images are rows and their first captions are columns, both sorted by scene. A model that knows the
scenes has bright blocks along the diagonal; a model that knows the images has a bright diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLOURS = "viridis"
ROWS = 256  # images compared with all captions at a time
WIDTH, TEXT_SIZE, GAP = 900, 15, 8
SIDE, MARGIN, LEAST_ROW = 720, 150, 11  # of the matrix and of the names beside it, pixels
RIGHT, WRONG, QUIET = "#2a7f3f", "#b3392f", "#606060"


@dataclass(frozen=True)
class HardNegative:
    """An image and the closest caption of another image.

    Args:
        image: index of the image
        own, other: indices of its best own caption, and of the best caption of another image
        own_score, other_score: cosine similarities of the image with them
    """

    image: int
    own: int
    other: int
    own_score: float
    other_score: float


def hard_negatives(
    images: Tensor, texts: Tensor, text_image: Tensor, captions: Sequence[str], count: int
) -> list[HardNegative]:
    """Returns the ``count`` images with the largest lead of another caption. A copy of an own caption is no negative.

    Args:
        images: L2-normalised features (I, d)
        texts: L2-normalised features of the captions (T, d)
        text_image: (T,), the image of each caption
        captions: T texts
    """
    owners = text_image.to(images.device)
    numbers = number_captions(captions).to(images.device)
    found: list[HardNegative] = []
    for start in range(0, len(images), ROWS):
        scores = images[start : start + ROWS] @ texts.T
        places = torch.arange(start, start + len(scores), device=images.device)
        own_captions = owners == places[:, None]
        own_score, own = scores.masked_fill(~own_captions, -torch.inf).max(1)
        other_score, other = scores.masked_fill(own_captions | same_caption(own_captions, numbers), -torch.inf).max(1)
        for row in (other_score - own_score).topk(min(count, len(scores))).indices.tolist():
            found.append(
                HardNegative(
                    start + row, int(own[row]), int(other[row]), float(own_score[row]), float(other_score[row])
                )
            )
    found = [each for each in found if np.isfinite(each.own_score) and np.isfinite(each.other_score)]
    return sorted(found, key=lambda each: each.own_score - each.other_score)[:count]


def number_captions(captions: Sequence[str]) -> Tensor:
    """Returns a number for each caption (T,), the same for equal captions."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[caption] for caption in captions])


def same_caption(own_captions: Tensor, numbers: Tensor) -> Tensor:
    """Marks all captions that equal a marked one: (R, T) -> (R, T); ``numbers (T,)`` is from `number_captions`."""
    marked = torch.zeros((len(own_captions), int(numbers.max()) + 1), dtype=torch.int32, device=own_captions.device)
    marked.index_add_(1, numbers, own_captions.to(torch.int32))
    return marked[:, numbers] > 0


def hard_negatives_panel(pixels: Tensor, found: Sequence[HardNegative], captions: Sequence[str]) -> Image.Image:
    """Draws a row for each: the image, uint8 (n, 3, H, W), the other caption, and the image's own below it."""
    _, _, height, width = pixels.shape
    row = max(height, 6 * (TEXT_SIZE + 4)) + GAP
    panel = Image.new("RGB", (max(WIDTH, width + 600), len(found) * row - GAP), "white")
    draw, font = ImageDraw.Draw(panel), load_font(TEXT_SIZE)
    for place, (image, each) in enumerate(zip(pixels, found, strict=True)):
        top, left = place * row, width + GAP
        panel.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (0, top))
        lost = each.other_score > each.own_score
        for text, colour in (
            (f"{each.other_score:.3f}  of another: {captions[each.other]}", WRONG if lost else QUIET),
            (f"{each.own_score:.3f}  its own: {captions[each.own]}", RIGHT),
        ):
            for line in fit_text(text, font, panel.width - left, lines=3):
                draw.text((left, top), line, fill=colour, font=font)
                top += TEXT_SIZE + 4
    return panel


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans from matplotlib, because Pillow's font lacks the letters of São Paulo."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def fit_text(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Returns at most ``lines`` lines of at most ``width`` pixels; if text is left over, the last line ends in "…"."""
    found = wrap_text(text, font, width)
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*found[: lines - 1], f"{last}…"]


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines of at most ``width`` pixels, between words, or within a word that is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def similarity_panel(similarity: Tensor, scenes: Sequence[str]) -> Image.Image:
    """Draws cosines (n, n) with the names of ``scenes``, the sorted scenes of rows and columns."""
    from matplotlib import colormaps

    values = similarity.detach().float().cpu().numpy()
    low, high = float(values.min()), float(values.max())
    shades = colormaps[COLOURS]((values - low) / max(high - low, 1e-12))[..., :3]
    cell = max(1, SIDE // len(values))
    side = cell * len(values)
    matrix = Image.fromarray((shades * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    panel = Image.new("RGB", (MARGIN + side, side + 2 * TEXT_SIZE), "white")
    panel.paste(matrix, (MARGIN, 0))
    draw, font = ImageDraw.Draw(panel), load_font(LEAST_ROW)
    start = written = 0
    for name, group in groupby(scenes):
        end = start + len(list(group))
        top, edge = start * cell, end * cell
        if top >= written:  # otherwise the previous name is in the way
            draw.text((2, top), (name or "no scene")[:24], fill="black", font=font)
            written = top + LEAST_ROW
        draw.rectangle((MARGIN + top, top, MARGIN + edge - 1, edge - 1), outline="white")
        start = end
    remark = f"rows: images, columns: their captions; darkest {low:.3f}, brightest {high:.3f}"
    draw.text((MARGIN, side + 6), remark, fill="black", font=font)
    return panel
