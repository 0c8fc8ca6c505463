"""The best answers to some queries: five captions of an image, and five images of a caption; right ones are marked.

An answer is right as recall counts it: the caption belongs to the image. So the same words, written for another image,
are wrong. Equal similarities keep the order of the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from priorclip.common.files import file_aside
from priorclip.model.pictures.retrieval_pictures import RIGHT, WRONG, fit_text, load_font
from priorclip.retrieval.confusion_sheets import GAP, INK, LINE, PAPER, SIDE, picture
from priorclip.retrieval.features import Features
from priorclip.retrieval.gallery import Gallery
from priorclip.retrieval.pictures.material import Material
from priorclip.retrieval.pictures.plain import printable

BEST, FRAME, TEXT, LINES = 5, 4, 440, 2
MARKS = {True: "✓", False: "✗"}
HIGH = SIDE + 3 * LINE + 2 * GAP


class Answer(NamedTuple):
    """A row of the features of captions or images, its cosine similarity with the query, and whether it is right."""

    row: int
    score: float
    right: bool


class Query(NamedTuple):
    """An image with its best captions, and its first caption with that caption's best images."""

    image: int
    captions: list[Answer]
    caption: int
    images: list[Answer]


def draw_panel(material: Material, path: Path) -> dict[str, Any]:
    """Writes the picture; returns ``queries``: keys, captions, similarities, and whether they are right."""
    features, gallery = material.first.features, material.gallery
    queries = [best_answers(features, row) for row in query_rows(material, features)]
    page = Image.new("RGB", (3 * GAP + SIDE + TEXT + BEST * (SIDE + GAP), HIGH * len(queries)), PAPER)
    for number, query in enumerate(queries):
        draw_query(page, number * HIGH + GAP, query, features, gallery)
    with file_aside(path, durable=False) as aside:
        page.save(aside, "PNG")
    return {"model": material.first.name, "queries": [describe(query, features, material.keys) for query in queries]}


def query_rows(material: Material, features: Features) -> list[int]:
    """Returns the rows of the queries. Raises ValueError if an image that --queries names cannot be used."""
    rows = {sample: row for row, sample in enumerate(features.samples.tolist())}
    for sample in material.order if material.config.queries else ():
        if sample not in rows:
            raise ValueError(f"--queries {material.keys[sample]}: this image cannot be used")
    found = [rows[sample] for sample in material.order if sample in rows]
    return found if material.config.queries else found[: material.config.count]


def best_answers(features: Features, image: int, count: int = BEST) -> Query:
    """Returns the ``count`` best captions of an image, and the ``count`` best images of its first caption."""
    own = features.owner == image
    caption = int(own.nonzero()[0])
    texts, images = features.texts.double(), features.images.double()
    return Query(
        image,
        take_best(texts @ images[image], own, count),
        caption,
        take_best(images @ texts[caption], torch.arange(len(images)) == image, count),
    )


def take_best(scores: Tensor, right: Tensor, count: int) -> list[Answer]:
    order = scores.argsort(descending=True, stable=True)[:count].tolist()
    return [Answer(row, float(scores[row]), bool(right[row])) for row in order]


def describe(query: Query, features: Features, keys: Sequence[str]) -> dict[str, Any]:
    def key(row: int) -> str:
        return keys[int(features.samples[row])]

    captions, images = query.captions, query.images
    return {
        "image": key(query.image),
        "captions": [{"caption": features.captions[row], "score": score, "right": ok} for row, score, ok in captions],
        "caption": features.captions[query.caption],
        "images": [{"image": key(row), "score": score, "right": ok} for row, score, ok in images],
    }


def draw_query(page: Image.Image, top: int, query: Query, features: Features, gallery: Gallery) -> None:
    """Draws the image, its captions to the right, and the images of its first caption to their right."""
    pen, font = ImageDraw.Draw(page), load_font(11)
    key = gallery.source.name(int(features.samples[query.image]))[1]
    write(pen, font, (GAP, top), key[-60:], INK, SIDE, 1)
    page.paste(picture(gallery, int(features.samples[query.image])), (GAP, top + 2 * LINE))
    left = 2 * GAP + SIDE
    for place, answer in enumerate(query.captions):
        text = f"{MARKS[answer.right]} {answer.score:.3f} {printable(features.captions[answer.row])}"
        at = (left, top + 2 * LINE + place * (LINES * LINE + 6))
        write(pen, font, at, text, RIGHT if answer.right else WRONG, TEXT - GAP, LINES)
    left += TEXT
    write(pen, font, (left, top), features.captions[query.caption], INK, BEST * (SIDE + GAP) - GAP, LINES)
    for place, answer in enumerate(query.images):
        draw_answer(page, pen, font, (left + place * (SIDE + GAP), top + 2 * LINE), answer, features, gallery)


def draw_answer(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    at: tuple[int, int],
    answer: Answer,
    features: Features,
    gallery: Gallery,
) -> None:
    """Draws an image in a frame, green if it is right and red otherwise, with the similarity below."""
    (x, y), colour = at, RIGHT if answer.right else WRONG
    page.paste(picture(gallery, int(features.samples[answer.row])), at)
    pen.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=colour, width=FRAME)
    write(pen, font, (x, y + SIDE + 1), f"{MARKS[answer.right]} {answer.score:.3f}", colour, SIDE, 1)


def write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    at: tuple[int, int],
    text: str,
    colour: str,
    width: int,
    lines: int,
) -> None:
    """Writes text of a data set in at most ``lines`` lines of ``width`` pixels."""
    for number, line in enumerate(fit_text(printable(text), font, width, lines)):
        pen.text((at[0], at[1] + number * LINE), line, colour, font)
