"""Deal a benchmark's images anew into train, validation and test, by seed and within each scene.

    python -m finetune resplit --json dataset_ucm_captions.json --output runs/splits --count 7 --test 0.286

A small test set measures coarsely, and one split says little of another. `resplit` writes split-0.json and so on:
the same Karpathy entries with other ``split`` fields, which ``data_shards pack --source karpathy`` reads. The images of
a scene are shuffled and tested in turn: cross-validation, in which split n goes on where split n - 1 ended. Of 7
images a scene, 2 of them tested, 7 splits test each image twice; then the scene is shuffled anew, so that 35 splits are
five such cross-validations. With ``--among train`` the official test images are left out and the training images dealt,
which is where to tune. ``--train 0.143`` keeps one of 7 images to train on and leaves the others out: how many captions
does a model need?
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
    """Write the files; returns their paths. ValueError where no image is left to deal, or an entry is wrong."""
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
    return annotated_label(entry) or stem_label(entry["filename"]) or ""


def deal(
    entries: list[dict[str, Any]],
    test: float,
    validation: float,
    train: float | None = None,
    *,
    seed: int,
    turn: int = 0,
) -> list[dict[str, Any]]:
    """The entries with new ``split`` fields: of each scene these shares, rounded, the rest for training.

    Turn n leaves as many of the shuffled images to the end as the n turns before have tested; when all images of a
    scene were tested equally often, it is shuffled anew. With a share to train on, what is beyond it is left out.
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
