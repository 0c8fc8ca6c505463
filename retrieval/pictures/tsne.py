"""t-SNE of images and captions in one plane: colour by scene, marker by modality, one plane a model.

    sample = draw_sample(features, count=500, seed=0)
    points = tsne_points(features, sample, seed=0)          # (2n, 2): the images, then their captions
    scores = silhouettes(features, sample)                  # {"images": 0.31, "captions": 0.18, "both": 0.22}

The silhouette is taken on the features themselves, by cosine distance, because t-SNE does not keep distances. Source:
van der Maaten and Hinton 2008, and Rousseeuw 1987, both as in scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from priorclip.retrieval.features import Features
from priorclip.retrieval.pictures.material import CannotDraw, Material
from priorclip.retrieval.pictures.plain import figure_file, printable

PERPLEXITY = 30.0
LEAST = 3  # images
MARKERS = {"images": "o", "captions": "^"}
NO_SCENE = "#999999"


class Sample(NamedTuple):
    """Rows of the drawn images (n,), and of one caption of each (n,)."""

    images: NDArray[np.int64]
    texts: NDArray[np.int64]


def draw_tsne(material: Material, path: Path) -> dict[str, Any]:
    """Writes the picture; returns ``images`` and for each model its ``silhouette``."""
    config, features = material.config, material.features
    sample = draw_sample(features[0], config.sample, config.seed)
    points = [tsne_points(each, sample, config.seed) for each in features]
    scores = [silhouettes(each, sample) for each in features]
    titles = [
        f"{printable(shown.name, 60)}\n{score_line(score)}"
        for shown, score in zip(material.models, scores, strict=True)
    ]
    labels = features[0].labels.numpy()[sample.images]
    draw_planes(path, points, titles, labels, features[0].classes)
    models = {shown.name: {"silhouette": score} for shown, score in zip(material.models, scores, strict=True)}
    return {"images": len(sample.images), "models": models}


def draw_sample(features: Features, count: int, seed: int) -> Sample:
    """Draws at most ``count`` images, and one caption of each. Raises CannotDraw for fewer than three images."""
    rng = np.random.default_rng(seed)
    owner = features.owner.numpy()
    rows = np.unique(owner)  # the images that have a caption
    if len(rows) < LEAST:
        raise CannotDraw(f"t-SNE needs at least {LEAST} images, but --data has {len(rows)}")
    images = np.sort(rng.choice(rows, min(count, len(rows)), replace=False))
    texts = [rng.choice(np.flatnonzero(owner == image)) for image in images]
    return Sample(images, np.array(texts, dtype=np.int64))


def both(features: Features, sample: Sample) -> NDArray[np.float64]:
    """Returns the features of the images and then of the captions, (2n, d)."""
    return np.concatenate([features.images.numpy()[sample.images], features.texts.numpy()[sample.texts]]).astype(float)


def tsne_points(features: Features, sample: Sample, seed: int) -> NDArray[np.float32]:
    """Returns the place of each image and then of each caption, (2n, 2)."""
    values = both(features, sample)
    perplexity = min(PERPLEXITY, (len(values) - 1) / 3)
    with threadpool_limits(1):  # because the sums of several threads have no fixed order
        return TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed).fit_transform(values)


def silhouettes(features: Features, sample: Sample) -> dict[str, float | None]:
    """Returns the mean silhouette by scene of images, captions and both; None without two scenes of several images."""
    labels = np.tile(features.labels.numpy()[sample.images], 2)
    values, half = both(features, sample), len(sample.images)
    parts = {"images": slice(0, half), "captions": slice(half, None), "both": slice(None)}
    return {name: silhouette(values[part], labels[part]) for name, part in parts.items()}


def silhouette(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float | None:
    known = labels >= 0
    if not 2 <= len(np.unique(labels[known])) < known.sum():
        return None
    return float(silhouette_score(values[known], labels[known], metric="cosine"))


def score_line(scores: dict[str, float | None]) -> str:
    if scores["both"] is None:
        return "no silhouette, because there are not two scenes"
    known = [f"{name} {score:.3f}" for name, score in scores.items() if score is not None]
    return f"silhouette by scene: {', '.join(known)}"


def draw_planes(
    path: Path,
    planes: Sequence[NDArray[np.float32]],
    titles: Sequence[str],
    labels: NDArray[np.int64],
    names: list[str],
) -> None:
    """Writes one plane beside the other, with the same colours.

    Args:
        path: PNG to write
        planes: (2n, 2) each, the images, then their captions
        titles: of the planes
        labels: (n,) scene of each image, -1 if it is unknown
        names: of the scenes
    """
    colours = scene_colours(len(names))
    present = sorted(set(labels.tolist()))
    columns = -(-len(present) // 32)
    with figure_file(path, 5.6 * len(planes) + 1.8 * columns, 6) as figure:
        axes = figure.subplots(1, len(planes), squeeze=False)[0]
        for axis, points, title in zip(axes, planes, titles, strict=True):
            draw_plane(axis, points, [colours[label] for label in labels])
            axis.set_title(title, fontsize=10)
        lines = [Line2D([], [], color="black", marker=mark, linestyle="", label=name) for name, mark in MARKERS.items()]
        lines += [Line2D([], [], color=colours[label], marker="s", linestyle="") for label in present]
        texts = [*MARKERS, *(legend_name(names[label]) if label >= 0 else "no scene" for label in present)]
        figure.legend(lines, texts, loc="outside right upper", fontsize=7, ncols=columns)


def draw_plane(axis: Axes, points: NDArray[np.float32], colours: list[Any]) -> None:
    for place, marker in enumerate(MARKERS.values()):
        part = points[place * len(colours) : (place + 1) * len(colours)]
        axis.scatter(part[:, 0], part[:, 1], s=16, c=colours, marker=marker, alpha=0.75, linewidths=0)
    axis.set_xticks([])
    axis.set_yticks([])


def scene_colours(count: int) -> dict[int, Any]:
    """Returns a colour for each scene, and for -1, no scene."""
    pairs = colormaps["tab20"](np.arange(20))  # a dark and a light shade of each colour
    shades = np.concatenate([pairs[::2], pairs[1::2]]) if count <= 20 else colormaps["turbo"](np.linspace(0, 1, count))
    return {-1: NO_SCENE, **{label: tuple(shades[label]) for label in range(count)}}


def legend_name(name: str) -> str:
    """Returns the name for a legend, which would leave out one that begins with "_"."""
    name = printable(name, 40)
    return f" {name}" if name.startswith("_") else name
