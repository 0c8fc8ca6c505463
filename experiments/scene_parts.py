"""Recall of the head, the middle and the tail of the scenes, from the test images of runs that are done.

    sizes = scene_sizes("runs/subsets/tail-1.5/seed-0")             # {"port": 190, "beach": 68, ...}
    scene_parts(sizes)                                              # {"port": "head", ..., "desert": "tail"}
    recall_by_part(images, scene_parts(sizes))                      # {"head": 21.3, "middle": 14.8, "tail": 9.1}

    scenes, largest first     1 .. 10 head     11 .. 20 middle     21 .. 30 tail

A third of the scenes is a part, as in the many-shot, medium-shot and few-shot classes of ImageNet-LT (Liu et al.,
Large-Scale Long-Tailed Recognition in an Open World, 2019), which bounds them by size. Here they are bounded by rank,
so that the same scenes can be compared while their sizes become equal. A query of a part searches in the whole gallery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from priorclip.common.output import get_logger
from priorclip.data_shards.format.manifest import Manifest
from priorclip.experiments.experiment import fill_names
from priorclip.experiments.intervals import MAIN, images_of_run
from priorclip.experiments.study import RowAtLevel, Study
from priorclip.experiments.sweep_table import Results
from priorclip.model.image_hits import ImageHits

logger = get_logger(__name__)

PARTS = ("head", "middle", "tail")


def scene_sizes(shards: str | Path) -> dict[str, int]:
    """Returns the number of images of each scene, from the manifest of a folder of shards.

    Raises:
        ValueError: there is no manifest, or it is damaged
    """
    manifest = Manifest.load(Path(shards))
    if manifest is None:
        raise ValueError(f"{shards} has no manifest: pack the shards, or run `data_shards index`")
    return manifest.class_counts


def scene_parts(sizes: Mapping[str, int]) -> dict[str, str]:
    """Maps each scene to its part. Scenes of one size are in alphabetic order; a rest makes the first parts larger.

    Raises:
        ValueError: there are fewer scenes than parts
    """
    if len(sizes) < len(PARTS):
        raise ValueError(f"head, middle and tail need at least {len(PARTS)} scenes, and there are {len(sizes)}")
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    groups = np.array_split(np.arange(len(names)), len(PARTS))
    return {names[place]: part for part, group in zip(PARTS, groups, strict=True) for place in group}


def recall_by_part(images: ImageHits, parts: Mapping[str, str]) -> dict[str, float]:
    """Returns the mean recall, percent, of the queries of each part. A part without test images is left out."""
    of_image = np.array([parts.get(scene, "") for scene in images.scenes])
    found = {}
    for part in PARTS:
        own = np.flatnonzero(of_image == part)
        if len(own) and images.captions[own].any():
            few = ImageHits([], [], images.captions[own], images.sums[:, own])
            found[part] = few.figures()[MAIN]
    return found


def results_by_part(
    study: Study, table: Mapping[str, Mapping[str, RowAtLevel]], results: Mapping[str, Results], seeds: Sequence[int]
) -> dict[str, dict[str, Results]]:
    """Returns part -> level -> row -> seed -> figures, as ``sweep`` has them for all scenes.

    ``study.scene_sizes`` names the shards whose sizes tell the parts of a seed. A seed without them is
    left out, and the log says so. A run without a file of its test images is left out.
    """
    if study.scene_sizes is None:
        return {}
    found: dict[str, dict[str, Results]] = {
        part: {level: {row: {} for row in rows} for level, rows in table.items()} for part in PARTS
    }
    for seed in seeds:
        first = next(iter(next(iter(table.values())).values()))
        places = {**study.places, **first.data.places, "seed": str(seed)}
        shards = str(fill_names(study.scene_sizes, places, study.name))
        try:
            parts = scene_parts(scene_sizes(shards))
        except ValueError as error:
            logger.warning("no recall of head, middle and tail for seed %d: %s", seed, error)
            continue
        for level, rows in table.items():
            for name, place in rows.items():
                run: Path = place.run(seed) / place.row.steps[-1].command
                images = images_of_run(run, results[level][name].get(seed, {}).get(MAIN))
                for part, value in recall_by_part(images, parts).items() if images else ():
                    found[part][level][name][seed] = {MAIN: value}
    return found
