"""What the pictures are drawn from: a test set, and one or two models with their features, encoded at the first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from priorclip.retrieval.commands import EvaluateConfig, PicturesConfig, TestSetConfig
from priorclip.retrieval.features import Features, LazyEncoder, encode_gallery
from priorclip.retrieval.gallery import Gallery, Skipped, open_gallery, with_captions


class CannotDraw(ValueError):
    """The model or the data lacks what a picture shows."""


class ShownModel:
    """A model and the features that it gives the test set."""

    def __init__(self, name: str, config: EvaluateConfig, caption_field: str, gallery: Gallery, skipped: Skipped):
        self.name, self.config, self.caption_field = name, config, caption_field
        self.gallery, self.skipped, self.model = gallery, skipped, LazyEncoder(config)

    @cached_property
    def features(self) -> Features:
        return encode_gallery(self.config, self.gallery, dict(self.skipped), self.model, self.caption_field)


class Material:
    """The test set and the models.

    Raises:
        OSError, ValueError: bad input, as in `open_gallery` and `with_captions`
    """

    def __init__(self, config: PicturesConfig) -> None:
        self.config = config
        gallery = open_gallery(config.data, config.images, config.split, config.limit)
        self.gallery, skipped = with_captions(gallery, config.caption_field)
        common = {item.name: getattr(config, item.name) for item in fields(TestSetConfig)}
        exports = [config.model, *([config.other] if config.other else [])]
        self.models = [
            ShownModel(
                name,
                EvaluateConfig(model=export, features=config.features, **common),
                config.caption_field,
                self.gallery,
                skipped,
            )
            for name, export in zip(short_names(exports), exports, strict=True)
        ]

    @property
    def first(self) -> ShownModel:
        return self.models[0]

    @cached_property
    def features(self) -> list[Features]:
        """The features of each model, of the same images. Raises ValueError if an image failed for one of them only."""
        found = [shown.features for shown in self.models]
        if not all(torch.equal(found[0].samples, other.samples) for other in found):
            raise ValueError(
                f"--data {self.config.data}: the models could not use the same images; run the command again"
            )
        return found

    @cached_property
    def order(self) -> list[int]:
        """The samples of the gallery in the order in which pictures take them: the queries, or all, shuffled."""
        if self.config.queries:
            return [self.find(word) for word in self.config.queries]
        return np.random.default_rng(self.config.seed).permutation(len(self.gallery.source)).tolist()

    @cached_property
    def keys(self) -> list[str]:
        return [self.gallery.source.name(sample)[1] for sample in range(len(self.gallery.source))]

    def find(self, word: str) -> int:
        """Returns the sample of a key, or of a file name. Raises ValueError if there is none, or more than one."""
        wanted = {word, str(PurePosixPath(word).with_suffix("")) if word else word}
        found = [sample for sample, key in enumerate(self.keys) if key in wanted]
        found = found or [sample for sample, key in enumerate(self.keys) if key.rpartition("/")[2] in wanted]
        if len(found) != 1:
            problem = f"{len(found)} images have" if found else "no image has"
            raise ValueError(f"--queries {word}: {problem} this key; a key looks like {self.keys[0]}")
        return found[0]


def short_names(exports: Sequence[str]) -> list[str]:
    """Returns the last parts of each path, so many that the names differ, but at least two: "soft/export"."""
    parts = [Path(export).resolve().parts for export in exports]
    for length in range(2, max(map(len, parts))):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(exports)
