"""What a retrieval model confuses, as pictures: hard negatives with their captions, and similarities by scene.

    found = hard_negatives(image_features, text_features, text_image, captions, count=8)
    hard_negatives_panel(pixels, found, captions).save("hard-negatives.png")
    similarity_panel(image_features[some] @ text_features[theirs].T, scenes).save("similarity.png")

A hard negative is an image for which a caption of another image scores above all of its own; the worst come first. In
the similarity matrix images are rows and their first captions columns, both in the order of their scenes: a model that
knows the scenes has bright blocks along the diagonal, one that knows the images a bright diagonal.
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
    """An image and the caption it is closest to among those of others.

    Args:
        image: place of the image
        own, other: places of its best caption, and of the best that is not its own
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
    """The ``count`` images whose own captions lose by most; a caption of the same words as an own one is no negative.

    Args:
        images: L2-normalised features (I, d)
        texts: of the captions (T, d)
        text_image: (T,), the image of each caption
        captions: T texts
    """
    owners = text_image.to(images.device)
    words = word_places(captions).to(images.device)
    found: list[HardNegative] = []
    for start in range(0, len(images), ROWS):
        scores = images[start : start + ROWS] @ texts.T
        places = torch.arange(start, start + len(scores), device=images.device)
        mine = owners == places[:, None]
        own_score, own = scores.masked_fill(~mine, -torch.inf).max(1)
        other_score, other = scores.masked_fill(mine | same_words(mine, words), -torch.inf).max(1)
        for row in (other_score - own_score).topk(min(count, len(scores))).indices.tolist():
            found.append(
                HardNegative(
                    start + row, int(own[row]), int(other[row]), float(own_score[row]), float(other_score[row])
                )
            )
    found = [each for each in found if np.isfinite(each.own_score) and np.isfinite(each.other_score)]
    return sorted(found, key=lambda each: each.own_score - each.other_score)[:count]


def word_places(captions: Sequence[str]) -> Tensor:
    """(T,): the same number for captions of the same words."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[caption] for caption in captions])


def same_words(mine: Tensor, words: Tensor) -> Tensor:
    """(R, T): captions with the words of one that is marked in ``mine (R, T)``; ``words (T,)`` numbers them."""
    marked = torch.zeros((len(mine), int(words.max()) + 1), dtype=torch.int32, device=mine.device)
    marked.index_add_(1, words, mine.to(torch.int32))
    return marked[:, words] > 0


def hard_negatives_panel(pixels: Tensor, found: Sequence[HardNegative], captions: Sequence[str]) -> Image.Image:
    """A row for each: uint8 (n, 3, H, W), the caption that wins above the image's own."""
    _, _, height, width = pixels.shape
    row = max(height, 6 * (TEXT_SIZE + 4)) + GAP
    panel = Image.new("RGB", (max(WIDTH, width + 600), len(found) * row - GAP), "white")
    draw, font = ImageDraw.Draw(panel), typeface(TEXT_SIZE)
    for place, (image, each) in enumerate(zip(pixels, found, strict=True)):
        top, left = place * row, width + GAP
        panel.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (0, top))
        lost = each.other_score > each.own_score
        for text, colour in (
            (f"{each.other_score:.3f}  of another: {captions[each.other]}", WRONG if lost else QUIET),
            (f"{each.own_score:.3f}  its own: {captions[each.own]}", RIGHT),
        ):
            for line in fitted(text, font, panel.width - left, lines=3):
                draw.text((left, top), line, fill=colour, font=font)
                top += TEXT_SIZE + 4
    return panel


def typeface(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Pillow's own font lacks the letters of São Paulo."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """At most so many lines, none wider than ``width`` pixels; where text is left over the last one ends in "…"."""
    found = wrapped(text, font, width)
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*found[: lines - 1], f"{last}…"]


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels, broken between words, and within a word that is wider."""
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
    """(n, n) cosines, rows and columns in the order of ``scenes``, equal ones side by side, with their names."""
    from matplotlib import colormaps

    values = similarity.detach().float().cpu().numpy()
    low, high = float(values.min()), float(values.max())
    shades = colormaps[COLOURS]((values - low) / max(high - low, 1e-12))[..., :3]
    cell = max(1, SIDE // len(values))
    side = cell * len(values)
    matrix = Image.fromarray((shades * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    panel = Image.new("RGB", (MARGIN + side, side + 2 * TEXT_SIZE), "white")
    panel.paste(matrix, (MARGIN, 0))
    draw, font = ImageDraw.Draw(panel), typeface(LEAST_ROW)
    start = written = 0
    for name, group in groupby(scenes):
        end = start + len(list(group))
        top, edge = start * cell, end * cell
        if top >= written:  # else the names before reach down here
            draw.text((2, top), (name or "no scene")[:24], fill="black", font=font)
            written = top + LEAST_ROW
        draw.rectangle((MARGIN + top, top, MARGIN + edge - 1, edge - 1), outline="white")
        start = end
    remark = f"rows: images, columns: their captions; darkest {low:.3f}, brightest {high:.3f}"
    draw.text((MARGIN, side + 6), remark, fill="black", font=font)
    return panel
