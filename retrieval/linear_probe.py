"""Linear probe: a logistic regression that predicts the scenes from the frozen image features.

    report, predicted = probe_report(learn, learn_labels, test, test_labels, classes, resamples=1000, seed=0)

It is scikit-learn's multinomial LogisticRegression (L-BFGS) on the L2-normalised features after the projection, which
retrieval compares too. A fifth of the training part, stratified by class, selects the inverse regularisation C from
CHOICES; then the whole training part trains the probe. The test part is used only at the end.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from priorclip.common.progress import counted
from priorclip.retrieval.zeroshot import classification_report, top_hits

CHOICES = tuple(float(f"{10.0**power:.3g}") for power in np.arange(-1, 5.01, 0.5))
VALIDATION = 0.2
STEPS = 1000


def probe_report(
    learn: NDArray[np.float32],
    learn_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
    classes: list[str],
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Trains and tests the probe. Returns the report and the predicted class of each labelled test image.

    The report has the keys of ``zero_shot_report``, ``C``, and ``validation``: top-1 in percent for each C.

    Args:
        learn, test: (I, d) features
        learn_labels, test_labels: (I,) class of each; -1 is left out
        classes: C names
        resamples: of the bootstrap, 0 for none
        seed: of the validation part and the bootstrap
    Raises:
        ValueError: fewer than two classes in the training part, or no labelled test image
    """
    learn, learn_labels = learn[learn_labels >= 0], learn_labels[learn_labels >= 0]
    test, test_labels = test[test_labels >= 0], test_labels[test_labels >= 0]
    if len(np.unique(learn_labels)) < 2:
        raise ValueError("the probe needs labelled training images of two or more scenes")
    inner, held_out = stratified_split(learn_labels, VALIDATION, seed)
    validation: dict[float, float] = {}
    for strength in counted(CHOICES if len(held_out) else (), "probe", "fit"):
        model = fit_probe(learn[inner], learn_labels[inner], strength)
        validation[strength] = float(100 * model.score(learn[held_out], learn_labels[held_out]))
    best = max(validation, key=lambda strength: validation[strength]) if validation else 1.0
    model = fit_probe(learn, learn_labels, best)
    values = model.decision_function(test).astype(np.float64)
    values = np.stack([np.zeros_like(values), values], 1) if values.ndim == 1 else values  # two classes
    scores = np.full((len(test), len(classes)), values.min() - 1)
    scores[:, model.classes_] = values
    top = top_hits(torch.from_numpy(scores), torch.from_numpy(test_labels))
    # an image of a class without training images counts as wrong
    top = {name: values * np.isin(test_labels, model.classes_) for name, values in top.items()}
    predicted = scores.argmax(1)
    report = classification_report(top, predicted, test_labels, classes, resamples, seed)
    return {**report, "learned_from": len(learn), "C": best, "validation": validation}, predicted


def fit_probe(features: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # at the largest C the accuracy is stable long before convergence
        return LogisticRegression(C=strength, max_iter=STEPS).fit(features, labels)


def stratified_split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the indices of two parts. The second has ``share`` of each class, rounded, but never a whole class."""
    rng = np.random.default_rng(seed)
    second = [
        rng.permutation(members)[: min(round(share * len(members)), len(members) - 1)]
        for label in np.unique(labels)
        for members in (np.flatnonzero(labels == label),)
    ]
    held_out = np.sort(np.concatenate(second)) if second else np.array([], np.int64)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
