"""What each test image contributes to the recalls, as a small CSV file beside a training's report.

    found = image_hits(hits, keys, scenes)                   # hits as model.recall.query_hits returns them
    write_image_hits(Path("run/test_images.csv"), found)
    read_image_hits(Path("run/test_images.csv")).figures()   # the recalls of report.json again

    key,scene,captions,i2t_r1,i2t_r5,i2t_r10,t2i_r1,t2i_r5,t2i_r10
    airport_12,airport,5,0,1,1,1,2,4

A column i2t holds the probability that the image finds one of its captions. A column t2i holds the sum of these
probabilities over the image's captions, each of which seeks the image. Two models that are tested on the same images
can so be compared image by image (model.bootstrap), without their weights.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from priorclip.common.files import write_bytes
from priorclip.model.bootstrap import Hits, image_sums

IMAGE_FILE = "test_images.csv"
FIGURES = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
HEAD = ["key", "scene", "captions", *FIGURES]


class ImageHits(NamedTuple):
    """One entry for each of I images, in the order of the test set.

    Args:
        keys: names of the images
        scenes: "" for none
        captions: (I,) number of captions
        sums: (6, I) sums of hit probabilities of the image's queries, by FIGURES
    """

    keys: list[str]
    scenes: list[str]
    captions: NDArray[np.int64]
    sums: NDArray[np.float64]

    def counts(self) -> NDArray[np.float64]:
        """Returns the number of queries of each image, (6, I). An image without a caption asks nothing."""
        asks = {"i2t": self.captions > 0, "t2i": self.captions}
        return np.stack([asks[figure[:3]] for figure in FIGURES]).astype(float)

    def figures(self) -> dict[str, float]:
        """Returns the recalls and their mean, percent, named as in model.recall."""
        recalls = 100 * self.sums.sum(1) / self.counts().sum(1)
        return {**dict(zip(FIGURES, recalls.tolist(), strict=True)), "mean_recall": float(recalls.mean())}


def image_hits(hits: Hits, keys: Sequence[str], scenes: Sequence[str]) -> ImageHits:
    """Adds up the hits of each image's queries. Raises KeyError if a figure is missing."""
    sums, counts = image_sums({figure: hits[figure] for figure in FIGURES}, len(keys))
    return ImageHits(list(keys), list(scenes), counts[FIGURES.index("t2i_r1")].astype(np.int64), sums)


def write_image_hits(path: Path, found: ImageHits) -> None:
    """Writes one line for each image; a crash leaves the old file or the new one."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(HEAD)
    for key, scene, captions, sums in zip(found.keys, found.scenes, found.captions, found.sums.T, strict=True):
        lines.writerow([key, scene, captions, *(f"{value:.15g}" for value in sums)])
    # A file name in Latin-1 is no UTF-8: it is written as \udce9.
    write_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"))


def read_image_hits(path: Path) -> ImageHits:
    """Reads the file. Raises ValueError, which names the file, if it has other columns or a wrong value."""
    with path.open(encoding="utf-8", newline="") as file:
        head, *lines = [*csv.reader(file)] or [[]]
    if head != HEAD or not lines:
        raise ValueError(f"{path}: needs the columns {','.join(HEAD)} and a line for each image, not {','.join(head)}")
    try:
        keys, scenes, captions, *sums = ([*column[1:]] for column in zip(head, *lines, strict=True))
        return ImageHits(keys, scenes, np.array(captions, np.int64), np.array(sums, np.float64))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
