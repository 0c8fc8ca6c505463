"""Recall of an exported model on a test set, by the field's protocol.

    gallery -> images -> features (I, d) -\\
            -> captions -> features (T, d) -> recall@1, 5, 10, both directions, mean -> report.json

An image that cannot be used leaves the test set with its captions, and the report lists it: figures with a non-empty
``skipped`` are of another, smaller test.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from model.recall import chance, retrieval_metrics
from retrieval.config import EvaluateConfig
from retrieval.encoder import Encoder, reasons
from retrieval.gallery import open_gallery, refuse_too_many, with_captions


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The report: recalls in percent, as model.recall names them, with those of chance and what was evaluated.

    Returns:
        ``mean_recall``, ``i2t_r1`` ... ``t2i_r10``, ``chance`` (the same keys), ``images``, ``captions``, ``model``,
        ``data``, ``split``, ``caption_field``, ``precision``, ``device``, ``skipped`` (reason -> keys), ``seconds``
    Raises:
        OSError, ValueError: bad input; the message names the file or key, and what to do
    """
    started = time.perf_counter()
    if config.output and Path(config.output).is_dir():
        raise IsADirectoryError(f"--output {config.output} is a folder: name the report, {config.output}/report.json")
    everything = open_gallery(config.data, config.images, config.split, config.limit)
    gallery, skipped = with_captions(everything, config.caption_field)
    encoder = Encoder.load(config.model, config.device, config.precision)
    batches = encoder.batches(gallery, config, config.caption_field)

    images = encoder.images(batches)
    usable = images.usable
    for reason, keys in reasons(gallery, usable, encoder.image_size, config.max_pixels).items():
        skipped.setdefault(reason, []).extend(keys)
    refuse_too_many(skipped, len(everything.source), config.max_bad_share)
    texts = encoder.texts(batches)

    owner = torch.from_numpy(batches.text_image)
    kept = usable[owner]
    row = usable.cumsum(0)[owner[kept]] - 1  # the image's place among those that are left
    metrics = retrieval_metrics(images.features[usable], texts[kept], row)
    return {
        **metrics,
        "chance": chance(row, images=int(usable.sum())),
        "images": int(usable.sum()),
        "captions": int(kept.sum()),
        "model": str(config.model),
        "data": str(config.data),
        "split": gallery.split,
        "caption_field": config.caption_field,
        "precision": config.precision,
        "device": str(encoder.device),
        "skipped": skipped,
        "seconds": round(time.perf_counter() - started, 3),
    }


def write_report(path: str | Path, report: dict[str, Any]) -> None:
    """Write the report as JSON, whole or not at all; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as handle:
            json.dump(report, handle, indent=2, ensure_ascii=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
