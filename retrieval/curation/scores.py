"""How well each pair fits, by a trained model: the cosine of image and caption, encoded once and stored.

    samples 0 .. 1999      ->  FOLDER/DIGEST/000000.safetensors
    samples 2000 .. 3999   ->  FOLDER/DIGEST/000001.safetensors     image features, usable, similarity of each pair

The digest covers the model, the precision and the shards, so a run with other thresholds, and a restarted one, encode
nothing again. Tasks of a SLURM array each encode their share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from priorclip.common.files import file_aside
from priorclip.common.progress import Progress
from priorclip.data_shards.pack.worker_pool import TaskShare
from priorclip.retrieval.commands import CurateConfig, EvaluateConfig
from priorclip.retrieval.features import LazyEncoder
from priorclip.retrieval.gallery import Gallery, open_gallery
from priorclip.retrieval.identity import describe_files

PART = 2000  # samples in one file


@dataclass(frozen=True)
class Scores:
    """What the model says about I samples with T pairs.

    Args:
        images: (I, d) float16 features, zeros for an image that cannot be read and for one without caption
        usable: (I,) bool
        similarity: (T,) float32 cosine of each pair, NaN if its image cannot be read
    """

    images: NDArray[np.float16]
    usable: NDArray[np.bool_]
    similarity: NDArray[np.float32]


def score_pairs(config: CurateConfig, captions: Sequence[Sequence[str]], folder: Path, share: TaskShare) -> Scores:
    """Encodes all images and captions, or reads what is stored.

    Args:
        config: shards, model and how to encode
        captions: of each sample; a sample without captions is not encoded
        folder: the store
        share: parts that this task encodes first; then it encodes those that no other task has finished

    Raises:
        ValueError: a stored file is damaged, or features are not finite
    """
    gallery = open_gallery(config.shards)
    encoding = EvaluateConfig(
        model=str(config.model), data=config.shards, batch_size=config.batch_size, device=config.device,
        precision=config.precision, workers=config.workers, max_pixels=config.max_pixels,
    )  # fmt: skip
    model = LazyEncoder(encoding)
    text = f"{model.digest} {gallery.origin.fingerprint} {config.max_pixels} {PART} {describe_files(gallery)}"
    store = folder / hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    store.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(captions), PART)
    paths = [store / f"{number:06d}.safetensors" for number in range(len(starts))]
    own = [number for number in range(len(paths)) if share.has(number)]
    rest = [number for number in reversed(range(len(paths))) if not share.has(number)]
    done = sum(len(captions[starts[number] : starts[number] + PART]) for number in own + rest if paths[number].exists())
    with Progress(len(captions), "score pairs", "img", done=done) as progress:
        for number in own + rest:
            if not paths[number].exists():  # another task may have written it since
                samples = range(starts[number], min(starts[number] + PART, len(captions)))
                write_part(paths[number], model, encoding, gallery, samples, captions)
                progress.update(len(samples))
    parts = [read_part(path) for path in paths]
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def write_part(
    path: Path,
    model: LazyEncoder,
    config: EvaluateConfig,
    gallery: Gallery,
    samples: range,
    captions: Sequence[Sequence[str]],
) -> None:
    """Encodes some samples and stores the result by one atomic write."""
    encoder = model.encoder
    width = encoder.model.config.embed_dim
    images = torch.zeros(len(samples), width, dtype=torch.float16)
    usable = torch.zeros(len(samples), dtype=torch.bool)
    similarity = torch.zeros(0)
    chosen = [sample for sample in samples if captions[sample]]
    if chosen:
        batches = encoder.batches(gallery.keep(chosen), config, "captions")
        found, texts = encoder.images(batches), encoder.texts(batches)
        owner = torch.tensor([row for row, sample in enumerate(chosen) for _ in captions[sample]])
        similarity = (found.features[owner] * texts).sum(1)
        similarity[~found.usable[owner]] = torch.nan
        rows = torch.tensor(chosen) - samples.start
        images[rows], usable[rows] = found.features.half(), found.usable
    with file_aside(path) as aside:
        save_file({"images": images, "usable": usable, "similarity": similarity.contiguous()}, aside)


def read_part(path: Path) -> tuple[NDArray[np.float16], NDArray[np.bool_], NDArray[np.float32]]:
    """Reads a stored part. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor("images"), file.get_tensor("usable"), file.get_tensor("similarity")
    except Exception as error:  # safetensors' own error is no subclass of ValueError
        raise ValueError(f"{path} cannot be read ({error}): remove it, and its samples are scored again") from error
