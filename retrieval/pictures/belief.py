"""Belief maps of some images: the belief M, the tokens that hard belief keeps, and the weights of soft belief.

    image | M | hard: the k tokens of highest belief | soft: M + 1/sqrt(R)

Both modes are drawn from the same belief, whichever of them the model was trained with, as the paper defines them. They
are computed in float64 by a copy of the model, so that small beliefs do not underflow to equal ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from priorclip.common.files import file_aside
from priorclip.data_shards.format.sample import BadSample
from priorclip.model.pictures.belief_maps import hard_map, paint_belief, paint_kept, soft_map
from priorclip.model.pictures.retrieval_pictures import load_font
from priorclip.retrieval.confusion_sheets import GAP, INK, LINE, PAPER, SIDE
from priorclip.retrieval.encoder import Encoder
from priorclip.retrieval.pictures.material import CannotDraw, Material
from priorclip.retrieval.pictures.panel import write

COLUMNS = 4


class BeliefRow(NamedTuple):
    """An image, uint8 (3, SIDE, SIDE), and its maps: belief and soft (h, w) float64, hard (h, w) bool."""

    key: str
    image: Tensor
    belief: Tensor
    hard: Tensor
    soft: Tensor


def draw_belief(material: Material, path: Path) -> dict[str, Any]:
    """Writes the picture; returns ``k``, the trained ``mode``, and for each image the kept tokens, row by row."""
    encoder = material.first.model.encoder
    if not encoder.model.has_belief:
        raise CannotDraw(f"the model in {material.first.config.model} has no scene prior, so it has no belief")
    rows = belief_rows(material, encoder)
    if not rows:
        raise CannotDraw(f"no image of --data {material.config.data} can be read")
    k, tokens = int(rows[0].hard.sum()), rows[0].hard.numel()
    mode = encoder.model.config.belief.mode
    headings = (f"trained with belief: {mode}", "belief M", f"hard: {k} of {tokens} tokens", "soft: M + 1/sqrt(R)")
    draw_rows(path, rows, headings)
    kept = [{"image": row.key, "kept": row.hard.flatten().nonzero().flatten().tolist()} for row in rows]
    return {"model": material.first.name, "mode": mode, "k": k, "tokens": tokens, "images": kept}


def belief_rows(material: Material, encoder: Encoder) -> list[BeliefRow]:
    """Returns the maps of the queries, or of the first ``count`` images that can be read."""
    config = material.config
    model = copy.deepcopy(encoder.model).double()
    rows = []
    for sample, image, pixels in prepared(material, encoder):
        with torch.inference_mode():
            belief = model.belief_map(pixels[None].to(encoder.device))[0].cpu()
        if not belief.isfinite().all():
            raise ValueError(
                f"the model in {encoder.folder} gives beliefs that are not finite: its weights are damaged"
            )
        hard = hard_map(belief, tokens_to_keep(config.k, encoder, belief))
        rows.append(BeliefRow(material.keys[sample], image, belief, hard, soft_map(belief)))
        if not config.queries and len(rows) == config.count:
            break
    return rows


def prepared(material: Material, encoder: Encoder) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields a sample and its image, uint8 (3, SIDE, SIDE) and as the model takes it.

    An image that cannot be read is left out. Raises ValueError if --queries names it.
    """
    for sample in material.order:
        try:
            data = material.gallery.source.read(sample).image
            image, pixels = (encoder.decode(data, side, material.config.max_pixels) for side in (SIDE, None))
        except BadSample as error:
            if material.config.queries:
                raise ValueError(f"--queries {material.keys[sample]}: {error}") from error
            continue
        yield sample, image, pixels


def tokens_to_keep(k: int | None, encoder: Encoder, belief: Tensor) -> int:
    """Returns --k, the model's own k, or half of the tokens. Raises ValueError if there are not so many."""
    if k is not None and k > belief.numel():
        raise ValueError(f"--k {k}: the model in {encoder.folder} has {belief.numel()} visual tokens")
    return k or encoder.model.config.belief.k or max(1, belief.numel() // 2)


def draw_rows(path: Path, rows: list[BeliefRow], headings: tuple[str, ...]) -> None:
    high = SIDE + LINE + GAP
    page = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), 2 * LINE + GAP + high * len(rows)), PAPER)
    pen, font = ImageDraw.Draw(page), load_font(11)
    for column, heading in enumerate(headings):
        write(pen, font, (GAP + column * (SIDE + GAP), GAP // 2), heading, INK, SIDE, 2)
    for number, row in enumerate(rows):
        top = 2 * LINE + GAP + number * high
        for column, drawn in enumerate(paint_row(row)):
            page.paste(drawn, (GAP + column * (SIDE + GAP), top))
        write(pen, font, (GAP, top + SIDE), row.key[-60:], INK, COLUMNS * SIDE, 1)
    with file_aside(path, durable=False) as aside:
        page.save(aside, "PNG")


def paint_row(row: BeliefRow) -> list[Image.Image]:
    photo = Image.fromarray(row.image.permute(1, 2, 0).contiguous().numpy())
    soft, belief = paint_belief(row.image, row.soft), paint_belief(row.image, row.belief)
    return [photo, belief, paint_kept(row.image, row.hard), soft]
