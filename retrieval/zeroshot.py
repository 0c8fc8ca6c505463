"""Zero-shot scene classification: the predicted class of an image is the one with the most similar prompts.

    names = class_names(["denseresidential", "SeaLake"])      # ["dense residential", "sea lake"]
    prompts = class_prompts(["airport"], "clip")              # [["satellite imagery of airport.", ...]]
    heads = class_features(encoder, prompts)                  # (C, d): mean over a class's prompts, normalised
    report, predicted = zero_shot_report(images, labels, classes, heads, resamples=1000)

A class's feature is the normalised mean of its prompts' normalised features (Radford et al. 2021, section 3.1.4).
Template sets: ``clip`` has the 18 templates of CLIP's evaluation on RESISC45; ``remoteclip`` has that of the RemoteCLIP
paper, "a satellite photo of {}."; ``scenes`` has those that caption label-only training images
(data_shards/sources/templates.py), with every wording of a scene. A text file with one template per line works too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence, Set
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from priorclip.data_shards.format.class_names import is_number
from priorclip.data_shards.sources.templates import SCENES, TEMPLATES, scene_phrases
from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.model.bootstrap import bootstrap_intervals
from priorclip.model.recall import Standing, hit_probability
from priorclip.retrieval.encoder import Encoder

CLIP_TEMPLATES = tuple(
    f"{view} {kind} of {article}{{}}."
    for article, kind, view in product(("", "a ", "the "), ("imagery", "photo", "view"), ("satellite", "aerial"))
)
REMOTECLIP_TEMPLATES = ("a satellite photo of {}.",)
SETS = {"clip": CLIP_TEMPLATES, "remoteclip": REMOTECLIP_TEMPLATES}
SHORTEST_WORD = 3
BATCH = 256  # prompts encoded at once
CONFUSIONS = 20
NO_LABEL = "no image has a scene label: name the folders by scene, or give labels in the annotation or the shards"


def class_names(labels: Iterable[str], file: str | None = None, words: Set[str] = frozenset()) -> list[str]:
    """Returns class names as words, from the folder names of data sets.

    ``BaseballField``, ``baseball_field`` and ``baseballfield`` all become "baseball field". The last is split if both
    parts are words of the scenes in sources/templates.py. ``file`` is a JSON object of label -> name, which overrides.
    ``words`` are labels that are words already.

    Raises:
        ValueError: the file has another form, or names an unknown class; a label is a number, which has no words
    """
    given = read_names(Path(file)) if file else {}
    labels = list(labels)
    unknown = sorted(set(given) - set(labels))
    if unknown:
        raise ValueError(f"--class_names {file} names {', '.join(unknown[:5])}: the classes are {', '.join(labels)}")
    refuse_numbers(label for label in labels if label not in given and label not in words)
    return [given.get(label) or (label if label in words else class_name(label)) for label in labels]


def refuse_numbers(labels: Iterable[str]) -> None:
    """Raises ValueError for labels that are numbers, because a prompt such as "a photo of a 0" says nothing."""
    numbers = [label for label in labels if is_number(label)]
    if numbers:
        raise ValueError(
            f"{len(numbers)} classes are numbers, such as {numbers[0]!r}, and prompts need names: put classnames.txt "
            "with one name a line beside the shards, or give --class_names names.json, such as "
            f'{{"{numbers[0]}": "airport"}}'
        )


def class_name(label: str) -> str:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", label)
    words = re.sub(r"[\W_]+", " ", spaced).lower().split()
    return " ".join(part for word in words for part in split_words(word)) or label


@cache
def split_words(word: str) -> tuple[str, ...]:
    """Splits a compound into known words, as few as possible. Returns the word itself if that is impossible."""
    known = vocabulary()
    if word in known or len(word) < 2 * SHORTEST_WORD:
        return (word,)
    best: dict[int, tuple[str, ...]] = {0: ()}  # words up to each letter
    for end in range(SHORTEST_WORD, len(word) + 1):
        options = [best[start] + (word[start:end],) for start in best if word[start:end] in known and start < end]
        if options:
            best[end] = min(options, key=len)
    return best.get(len(word), (word,))


@cache
def vocabulary() -> frozenset[str]:
    """Returns the words in the scene phrases of sources/templates.py."""
    words = {word for phrases in SCENES.values() for phrase in phrases for word in re.findall(r"[a-z]+", phrase)}
    words |= {word.removesuffix("s") for word in words if not word.endswith("ss")}
    return frozenset(word for word in words if len(word) >= SHORTEST_WORD)


def read_names(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--class_names {path} cannot be read: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise ValueError(f"--class_names {path} must hold a JSON object of label: name, both strings")
    return names


def class_prompts(
    labels: Sequence[str], templates: str = "clip", file: str | None = None, words: Set[str] = frozenset()
) -> list[list[str]]:
    """Returns the prompts of each class. Raises ValueError for a template without ``{}``, or with other braces."""
    if templates == "scenes":
        refuse_numbers(label for label in labels if not file and label not in words)
        names = class_names(labels, file, words) if file else labels
        return [[text.format(scene=scene) for text in TEMPLATES for scene in scene_phrases(name)] for name in names]
    chosen = SETS[templates] if templates in SETS else read_templates(Path(templates))
    return [[template.replace("{}", name) for template in chosen] for name in class_names(labels, file, words)]


def read_templates(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--templates {path} is neither a file nor one of {', '.join([*SETS, 'scenes'])}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--templates {path} is not UTF-8 text: {error}") from error
    # CLIP Benchmark writes the name as {c}.
    lines = [line.strip().replace("{c}", "{}") for line in text.splitlines() if line.strip()]
    for line in lines:
        if "{}" not in line:
            raise ValueError(f"--templates {path}: '{line}' has no {{}} for the class name")
        if re.search(r"[{}]", line.replace("{}", "")):
            raise ValueError(f"--templates {path}: '{line}' has other braces besides the {{}} for the class name")
    if not lines:
        raise ValueError(f"--templates {path} is empty: write one template per line, with {{}} for the class name")
    return lines


def class_features(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Returns the normalised mean of each class's prompts, (C, d) float32. Raises ValueError if one is not finite."""
    flat = [text for texts in prompts for text in texts]
    rows = []
    for start in range(0, len(flat), BATCH):
        inputs = tokenize(encoder.tokenizer, flat[start : start + BATCH])
        moved = {name: value.to(encoder.device) for name, value in inputs.items()}
        rows.append(encoder(**moved)["text_features"].float().cpu())
    features = normalize(torch.cat(rows), dim=-1)
    encoder.check_finite(features)
    return normalize(torch.stack([part.mean(0) for part in features.split([len(texts) for texts in prompts])]), dim=-1)


def zero_shot_report(
    images: Tensor, labels: Tensor, classes: list[str], heads: Tensor, resamples: int, seed: int = 0
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Returns the report and the predicted class of each labelled image.

    The report has accuracies in percent, ``top1``, ``top5`` and ``mean_class_recall``, and ``intervals``, ``classes``
    and ``confusions``. Classes with equal features are a tie, which counts as the expectation over random orders.

    Args:
        images: (I, d) L2-normalised
        labels: (I,) class of each; -1 is left out
        classes: C names
        heads: (C, d), from ``class_features``
        resamples: of the bootstrap, 0 for none
        seed: of the bootstrap
    """
    known = labels >= 0
    scores, wanted = images[known].double() @ heads.double().T, labels[known]
    predicted = scores.argmax(1).numpy()
    report = classification_report(top_hits(scores, wanted), predicted, wanted.numpy(), classes, resamples, seed)
    return report, predicted


def top_hits(scores: Tensor, wanted: Tensor) -> dict[str, NDArray[np.float64]]:
    """Returns ``top1`` and ``top5``: the probability (I,) that an image's own class is among the first 1 or 5.

    Ties are in random order.

    Args:
        scores: (I, C) float64
        wanted: (I,) class of each
    """
    own = scores.gather(1, wanted[:, None])
    level = (scores - own).abs() <= 1e-12
    standing = Standing(((scores > own) & ~level).sum(1), level.sum(1) - 1, torch.ones_like(wanted))
    return {f"top{k}": hit_probability(standing, k).numpy() for k in (1, 5)}


def classification_report(
    top: dict[str, NDArray[np.float64]],
    predicted: NDArray[np.int64],
    wanted: NDArray[np.int64],
    classes: list[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the report of a classification.

    ``classes`` has images and top-1 recall of each class; ``confusions`` has [class, predicted class, images], the
    largest first.

    Args:
        top: for each k: the success (I,) of each image
        predicted, wanted: (I,) predicted class and class of each image
        classes: names
        resamples: of the bootstrap, 0 for none
        seed: of the bootstrap

    Raises:
        ValueError: no image has a label
    """
    if not len(wanted):
        raise ValueError(NO_LABEL)
    report: dict[str, Any] = {name: float(100 * values.mean()) for name, values in top.items()}
    per_class = {
        name: {"images": int((wanted == label).sum()), "recall": float(100 * top["top1"][wanted == label].mean())}
        for label, name in enumerate(classes)
        if (wanted == label).any()
    }
    report["mean_class_recall"] = sum(row["recall"] for row in per_class.values()) / len(per_class)
    report["images"] = len(wanted)
    if resamples:
        every = np.arange(len(wanted))
        hits = {name: (values, every) for name, values in top.items()}
        report["intervals"] = bootstrap_intervals(hits, len(wanted), resamples, seed, mean=None)
    report["classes"] = per_class
    matrix = np.zeros((len(classes), len(classes)), int)
    np.add.at(matrix, (wanted, predicted), 1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(place), len(classes)) for place in order]
    report["confusions"] = [[classes[i], classes[j], int(matrix[i, j])] for i, j in pairs if matrix[i, j]]
    return report
