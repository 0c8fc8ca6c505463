"""Measures an exported model on a test set, from features that are encoded once.

    gallery -> images -> features (I, d) -\\
            -> captions -> features (T, d) -> retrieval: recall@1, 5, 10, both directions, mean -> report.json
                                           -> zeroshot, probe: scene classification

An image that cannot be used is left out with its captions, and the report lists it. So figures with a non-empty
``skipped`` belong to a smaller test set.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from priorclip.common.files import write_bytes
from priorclip.common.masking import masked
from priorclip.data_shards.format.class_names import ClassIds
from priorclip.model.device import pick_device
from priorclip.retrieval.commands import EvaluateConfig
from priorclip.retrieval.confusion_sheets import draw_retrieval_confusions, draw_scene_confusions
from priorclip.retrieval.features import Features, LazyEncoder, encode_gallery
from priorclip.retrieval.gallery import Gallery, Skipped, open_gallery, with_captions
from priorclip.retrieval.linear_probe import probe_report, stratified_split
from priorclip.retrieval.published_results import compare_with_published
from priorclip.retrieval.recall_report import recall_report
from priorclip.retrieval.shared_encoding import is_first
from priorclip.retrieval.zeroshot import NO_LABEL, class_features, class_prompts, zero_shot_report


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a model and returns the report. Figures are in percent.

    Returns:
        ``images``, ``model``, ``data``, ``split``, ``precision``, ``device``, ``skipped`` (reason -> keys) and
        ``seconds``. Task retrieval: ``mean_recall``, ``i2t_r1`` ... ``t2i_r10`` as in model.recall, ``captions``,
        ``caption_field``, and ``chance``, ``intervals``, ``classes`` as in ``recall_report``; if asked for,
        ``comparison`` (published_results.py) and ``confusions``. ``zeroshot`` and ``probe`` as in
        ``zero_shot_report`` and ``probe_report``
    Raises:
        OSError, ValueError: bad input; the message names the file or key, and what to do
    """
    started = time.perf_counter()
    check_outputs(config)
    retrieval = "retrieval" in config.chosen
    gallery, skipped = open_gallery(config.data, config.images, config.split, config.limit), Skipped()
    if retrieval:
        gallery, skipped = with_captions(gallery, config.caption_field)
    model, device = LazyEncoder(config), pick_device(config.device)
    features = encode_gallery(config, gallery, skipped, model, config.caption_field if retrieval else None)
    report: dict[str, Any] = {}
    if retrieval:
        report |= recall_report(features, config.bootstrap, config.seed)
        report |= {"captions": len(features.texts), "caption_field": config.caption_field}
    report |= {
        "images": len(features.images),
        "model": str(config.model),
        "data": masked(str(config.data)),
        "split": gallery.split,
        "precision": config.precision,
        "device": str(device),
        "skipped": features.skipped,
    }
    if retrieval and config.benchmark:
        report["comparison"] = compare_with_published(config.benchmark, report)
    classified = {
        task: run(config, features, model, gallery)
        for task, run in (("zeroshot", run_zero_shot), ("probe", run_probe))
        if task in config.chosen
    }
    report |= {task: found.report for task, found in classified.items()}
    if not is_first():
        return report
    if config.confusions and retrieval:
        report["confusions"] = draw_retrieval_confusions(config.confusions, gallery, features)
    elif config.confusions:
        draw_confused_scenes(config.confusions, gallery, features, classified[config.chosen[0]])
    return {**report, "seconds": round(time.perf_counter() - started, 3)}


def check_outputs(config: EvaluateConfig) -> None:
    """Raises OSError if an output cannot be written at the end, because the encoding before it takes hours."""
    if config.output and Path(config.output).is_dir():
        raise IsADirectoryError(
            f"--output {config.output} is a folder: name a file, such as {config.output}/report.json"
        )
    if config.confusions and Path(config.confusions).is_dir():
        raise IsADirectoryError(
            f"--confusions {config.confusions} is a folder: name a file, such as {config.confusions}/confusions.png"
        )
    parents = [Path(place).parent for place in (config.output, config.confusions) if place]
    for folder in (*parents, *([Path(config.features)] if config.features else [])):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, not a folder: name another place")
        folder.mkdir(parents=True, exist_ok=True)


class Classification(NamedTuple):
    """The result of a classification: the tested rows of ``features``, and the predicted class of each."""

    report: dict[str, Any]
    tested: NDArray[np.int64]
    predicted: NDArray[np.int64]


def run_zero_shot(config: EvaluateConfig, features: Features, model: LazyEncoder, gallery: Gallery) -> Classification:
    if not labelled_rows(features).size:
        raise ValueError(f"--data {masked(str(config.data))}: {NO_LABEL}")
    words: frozenset[str] = getattr(gallery.origin, "class_words", frozenset())
    prompts = class_prompts(features.classes, config.templates, config.class_names, words)
    heads = class_features(model.encoder, prompts)
    report, predicted = zero_shot_report(
        features.images, features.labels, features.classes, heads, config.bootstrap, config.seed
    )
    firsts = {name: texts[0] for name, texts in zip(features.classes, prompts, strict=True)}
    about = {"templates": config.templates, "prompts": sum(map(len, prompts)), "first_prompts": firsts}
    return Classification({**report, **about}, labelled_rows(features), predicted)


def run_probe(config: EvaluateConfig, features: Features, model: LazyEncoder, gallery: Gallery) -> Classification:
    """Trains the probe on ``probe_data``, or on a part of each class of the test set, and tests it."""
    tested = labelled_rows(features)
    if config.probe_data is None:
        learned, held_out = stratified_split(features.labels.numpy()[tested], 1 - config.train_share, config.seed)
        learn = select_rows(features, tested[learned])
        tested = tested[held_out]
        if len(learned) and not len(tested):
            raise ValueError(
                f"--train_share {config.train_share:g} leaves no image to test the probe: give training images with "
                "--probe_data"
            )
    else:
        learn = probe_training_set(config, features.classes, model, gallery)
    test = select_rows(features, tested)
    report, predicted = probe_report(*learn, *test, features.classes, config.bootstrap, config.seed)
    return Classification(report, tested, predicted)


def probe_training_set(
    config: EvaluateConfig, classes: list[str], model: LazyEncoder, tested: Gallery
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns features and labels of ``probe_data``, without the scenes that the test set does not have.

    Raises ValueError if it lacks a scene of the test set, or contains images of the test set.
    """
    assert config.probe_data is not None
    data, images, split = config.probe_data, config.probe_images, config.probe_split
    other = replace(config, data=data, images=images, split=split, limit=None)
    learned = open_gallery(data, images, split)
    common_images = locations(tested) & locations(learned)
    if common_images:
        raise ValueError(
            f"--probe_data {data} has {len(common_images)} images of the test set --data {config.data}, so the probe "
            "would be tested on its training images. Name other images, for example with --probe_split train"
        )
    found = encode_gallery(other, learned, {}, model, None)
    ids = ClassIds(classes)
    known = [ids[name] for name in found.classes]
    missing = [name for label, name in enumerate(classes) if label not in known]
    if missing:
        raise ValueError(
            f"--probe_data {data} has no image of {', '.join(missing[:5])}, but --data {config.data} has: check that "
            "both spell the classes in the same way"
        )
    return found.images.numpy(), np.array([*known, -1])[found.labels.numpy()]


def locations(gallery: Gallery) -> set[tuple[Any, ...]]:
    return {tuple(gallery.location(sample).values()) for sample in range(len(gallery.source))}


def labelled_rows(features: Features) -> NDArray[np.int64]:
    """Returns the rows of the images whose scene is known."""
    return (features.labels >= 0).nonzero().flatten().numpy()


def select_rows(features: Features, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return features.images[rows].numpy(), features.labels[rows].numpy()


def draw_confused_scenes(path: str, gallery: Gallery, features: Features, found: Classification) -> None:
    samples, labels = features.samples[found.tested].numpy(), features.labels[found.tested].numpy()
    pairs = found.report["confusions"]
    draw_scene_confusions(path, gallery, samples, labels, found.predicted, features.classes, pairs)


def write_report(path: str | Path, report: dict[str, Any]) -> None:
    """Writes the report as JSON by one atomic write. Creates missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name in Latin-1 is no UTF-8: it is written as \\udce9, which JSON reads back.
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))
