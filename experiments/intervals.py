"""95 % intervals of a table's mean recalls and of their paired differences, by a bootstrap over the test images.

    images = images_of(rows, results, Path("runs/belief"))      # test_images.csv of each run, by row and seed
    intervals = image_intervals(images)
    intervals["closed-soft", ""]                                # of the row's mean recall, its seeds averaged
    intervals["closed-soft", "closed-baseline"]                 # of the row less the other row

The spread over seeds says how much a training varies on the same test images. The interval says how much the figure
would vary on other test images of the same kind. Each image is drawn with its captions, and a difference takes the same
drawn images for both rows, so that an image that is hard for both says nothing (a paired cluster bootstrap: Davison and
Hinkley, Bootstrap Methods and their Application, 1997).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.experiments.experiment import Experiment
from priorclip.model.bootstrap import interval, resample
from priorclip.model.image_hits import IMAGE_FILE, ImageHits, read_image_hits

RESAMPLES = 10_000  # the bounds then vary by less than 0.1 points with the seed of the draws
MAIN = "mean_recall"

Images = dict[str, dict[int, ImageHits]]  # by row and seed
Intervals = Mapping[tuple[str, str], tuple[float, float]]  # by row and the row that is subtracted, "" for none


def run_folder(folder: Path, row: Experiment, seed: int) -> Path:
    """Returns the folder of a run's last training in the folder of a sweep."""
    return folder / row.name / f"seed-{seed}" / row.steps[-1].command


def images_of(rows: Iterable[Experiment], results: Mapping[str, Mapping[int, Any]], folder: Path) -> Images:
    """Reads the test images of each run. A row is left out if the file of one of its runs is missing.

    A file that does not give the run's mean recall is not of this run: it is older, or the figures are the mean of
    a cross-validation.
    """
    found: Images = {}
    for row in rows:
        runs = results[row.name]
        read = {seed: images_of_run(run_folder(folder, row, seed), run.get(MAIN)) for seed, run in runs.items()}
        known = {seed: images for seed, images in read.items() if images is not None}
        if known and len(known) == len(runs):
            found[row.name] = known
    return found


def images_of_run(folder: Path, mean_recall: float | None) -> ImageHits | None:
    """Returns the test images of a run, or None if there is no file that gives this mean recall."""
    path = folder / IMAGE_FILE
    if mean_recall is None or not path.is_file():
        return None
    images = read_image_hits(path)
    return images if math.isclose(images.figures()[MAIN], mean_recall, abs_tol=1e-6) else None


def image_intervals(images: Mapping[str, Mapping[int, ImageHits]], resamples: int = RESAMPLES) -> Intervals:
    """Returns the interval of each row whose runs have the same test images, and of each difference of two such rows.

    A difference averages over the seeds that both rows have. Bounds are in percent.
    """

    @cache
    def drawn(row: str, seeds: tuple[int, ...]) -> NDArray[np.float64]:
        runs = [images[row][seed] for seed in seeds]
        mean = np.mean([run.sums for run in runs], axis=0)
        return resample(mean, runs[0].counts(), resamples).mean(1)

    good = [row for row, runs in images.items() if same_images(runs.values())]
    found = {(row, ""): interval(drawn(row, tuple(images[row]))) for row in good}
    for row in good:
        for other in good:
            both = tuple(seed for seed in images[row] if seed in images[other])
            if row != other and both and same_images([images[row][both[0]], images[other][both[0]]]):
                found[row, other] = interval(drawn(row, both) - drawn(other, both))
    return found


def same_images(runs: Iterable[ImageHits]) -> bool:
    """Returns whether all runs are tested on the same images, in the same order, with as many captions."""
    tests = [(run.keys, run.captions.tolist()) for run in runs]
    return all(test == tests[0] for test in tests)


def with_interval(value: dict[str, Any], bounds: Sequence[float] | None) -> dict[str, Any]:
    """Adds an interval to a mean and spread, if there is one."""
    return value if bounds is None else {**value, "interval": list(bounds)}
