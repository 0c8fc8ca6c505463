"""Splits a benchmark's images again into train, validation and test, by seed and within each scene.

    python -m experiments resplit --json dataset_ucm_captions.json --output runs/splits --count 7 --test 0.286

A small test set gives imprecise figures, and splits differ. `resplit` writes split-0.json, split-1.json and so on: the
same Karpathy entries with other ``split`` fields, which ``data_shards pack --source karpathy`` reads. The images of a
scene are shuffled and tested in turn. This is a cross-validation, in which split n continues where split n - 1 ended.
With 7 images in a scene and 2 of them tested, 7 splits test each image twice. Then the scene is shuffled again, so 35
splits are five such cross-validations. ``--among train`` leaves the official test images out and splits the training
images, for tuning. ``--train 0.143`` keeps one of 7 training images and leaves the others out, to measure how many
captions a model needs.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from priorclip.data_shards.sources.benchmark import annotated_label, read_karpathy
from priorclip.data_shards.sources.names import stem_label
from priorclip.experiments.commands import ResplitConfig


def resplit(config: ResplitConfig) -> list[Path]:
    """Writes the files and returns their paths. Raises ValueError for a wrong entry, or if there are no images."""
    whole = read_karpathy(Path(config.json))
    for entry in whole["images"]:
        try:
            scene_of(entry)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{config.json}: an entry of 'images' lacks {error}: {str(entry)[:120]}") from error
    entries = [entry for entry in whole["images"] if config.among in (None, entry.get("split"))]
    if not entries:
        splits = sorted({str(entry.get("split")) for entry in whole["images"]})
        wanted = "" if config.among is None else f" of split '{config.among}'"
        raise ValueError(f"{config.json}: no image{wanted}; its splits are {', '.join(splits) or 'none'}")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(config.count):
        path = folder / f"split-{number}.json"
        dealt = deal(entries, config.test, config.validation, config.train, seed=config.seed, turn=number)
        path.write_text(json.dumps({**whole, "images": dealt}), encoding="utf-8")
        paths.append(path)
    return paths


def scene_of(entry: dict[str, Any]) -> str:
    name = entry["filename"]
    return annotated_label(entry, f"the entry of {name}") or stem_label(name) or ""


def deal(
    entries: list[dict[str, Any]],
    test: float,
    validation: float,
    train: float | None = None,
    *,
    seed: int,
    turn: int = 0,
) -> list[dict[str, Any]]:
    """Returns the entries with new ``split`` fields: the rounded shares of each scene, and the rest for training.

    Turn n starts with the shuffled images that the n turns before have not tested yet. When all images of a scene
    have been tested equally often, the scene is shuffled again. With ``train``, images beyond that share are left out.
    """
    scenes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in copy.deepcopy(entries):
        scenes[scene_of(entry)].append(entry)
    rng, dealt = random.Random(seed), []
    for scene in sorted(scenes):
        own = scenes[scene]
        rng.shuffle(own)
        shares = (1.0 if train is None else train, test, validation)
        kept, tested, validated = (round(share * len(own)) for share in shares)
        cycle = len(own) // math.gcd(len(own), tested)
        if turn >= cycle:
            random.Random(f"{seed} {scene} {turn // cycle}").shuffle(own)
        for number, entry in enumerate(own):
            place = (number - turn * tested) % len(own)
            entry["split"] = "test" if place < tested else "val" if place < tested + validated else "train"
            if place < tested + validated + kept:
                dealt.append(entry)
    return dealt
