"""Features of a model on a test set, encoded once and stored: every further evaluation reads the file.

    features = encode_gallery(config, gallery, skipped, model)
    features.images (I, d), features.texts (T, d), features.owner (T,) row of each text's image, features.labels (I,)

With ``--features FOLDER`` they are stored in ``FOLDER/DIGEST.safetensors``. The digest covers everything that they
depend on: the model's weights and configuration, the precision, the samples with their captions and scenes, size and
time of the image files, and the limit of pixels. So a changed image or caption is encoded again, and one folder serves
any number of models and test sets.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from priorclip.common.files import file_aside
from priorclip.common.output import get_logger
from priorclip.retrieval.commands import EvaluateConfig
from priorclip.retrieval.encoder import Encoder, find_skip_reasons, remember
from priorclip.retrieval.gallery import Gallery, Skipped, merge_skipped, refuse_too_many
from priorclip.retrieval.identity import data_digest, list_captions, model_digest
from priorclip.retrieval.shared_encoding import is_first, of_first_rank

log = get_logger(__name__)

VERSION = 2


@dataclass(frozen=True)
class Features:
    """The features of the usable part of a test set.

    Args:
        images: (I, d) float32, L2-normalised
        texts: (T, d) of the captions of these images; T = 0 if captions are not needed
        owner: (T,) the row of each text's image
        labels: (I,) index of the scene in ``classes``, -1 if it is unknown
        classes: scene classes, sorted
        samples: (I,) index of each image in the gallery
        captions: (T,) the texts
        skipped: reason -> keys of the samples that cannot be used
    """

    images: Tensor
    texts: Tensor
    owner: Tensor
    labels: Tensor
    classes: list[str]
    samples: Tensor
    captions: list[str]
    skipped: Skipped


class LazyEncoder:
    """An encoder that is loaded at its first use, because stored features need none."""

    def __init__(self, config: EvaluateConfig, memory: str | None = None) -> None:
        self.config, self.memory = config, memory

    @cached_property
    def encoder(self) -> Encoder:
        encoder = Encoder.load(self.config.model, self.config.device, self.config.precision)
        if self.memory:
            remember(encoder.model, self.memory, self.config.precision)
        return encoder

    @cached_property
    def digest(self) -> str:
        """A hash of weights, configuration, tokenizer and precision."""
        folder = Path(self.config.model)
        if not (folder / "model.safetensors").is_file():
            return self.encoder.folder.name  # loading the encoder raises the error
        return model_digest(folder, f"{VERSION} {self.config.precision}")


def encode_gallery(
    config: EvaluateConfig,
    gallery: Gallery,
    skipped: Skipped,
    model: LazyEncoder,
    caption_field: str | None = "captions",
    variant: str = "",
) -> Features:
    """Returns the features of the gallery's images, and of its captions, from the store if they are there.

    Args:
        config: the options of encoding, and the limit of bad images
        gallery: the samples; with ``caption_field`` all of them have captions
        skipped: samples that were left out before
        model: the encoder
        caption_field: list in KEY.json; None for images only
        variant: how the gallery's pixels differ from the files, for example a corruption with its seed

    Raises:
        ValueError: too many images cannot be used
    """
    place = None
    if config.features:
        data = f"{variant} {config.max_pixels} {data_digest(gallery, caption_field)}"
        digest = hashlib.sha256(f"{model.digest} {data}".encode())
        place = Path(config.features) / f"{digest.hexdigest()[:32]}.safetensors"
    if place is not None and of_first_rank(place.is_file()):
        found, left_out = read_features(place)
        log.info("features from %s", place)
    else:
        encoder = model.encoder
        batches = encoder.batches(gallery, config, caption_field)
        images = encoder.images(batches)
        left_out = find_skip_reasons(gallery, images.usable, encoder, config.max_pixels)
        texts = encoder.texts(batches) if caption_field else images.features.new_zeros(0, images.features.shape[1])
        found = {"images": images.features, "usable": images.usable, "labels": images.labels, "texts": texts}
        if place is not None and is_first():
            write_features(place, found, left_out)
    skipped = merge_skipped(skipped, left_out)
    total = len(gallery.origin) if config.limit is None else min(config.limit, len(gallery.origin))
    refuse_too_many(skipped, total, config.max_bad_share)
    captions, owners = list_captions(gallery, caption_field)
    usable, owner = found["usable"], torch.from_numpy(owners)
    kept = usable[owner]
    return Features(
        found["images"][usable],
        found["texts"][kept],
        usable.cumsum(0)[owner[kept]] - 1,  # the row of the image among the usable ones
        found["labels"][usable],
        list(gallery.source.classes),
        usable.nonzero().flatten(),
        [caption for caption, keep in zip(captions, kept.tolist(), strict=True) if keep],
        skipped,
    )


def read_features(place: Path) -> tuple[dict[str, Tensor], Skipped]:
    """Reads stored features. Raises ValueError if the file is damaged."""
    try:
        with safe_open(place, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in ("images", "usable", "labels", "texts")}
            return found, json.loads((file.metadata() or {})["skipped"])
    except Exception as error:  # safetensors' own error is no subclass of ValueError
        raise ValueError(f"{place} cannot be read ({error}): remove it, then the features are encoded again") from error


def write_features(place: Path, found: dict[str, Tensor], skipped: Skipped) -> None:
    """Stores the features by one atomic write."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(place, durable=False) as aside:
        save_file({name: value.contiguous() for name, value in found.items()}, aside, {"skipped": json.dumps(skipped)})
