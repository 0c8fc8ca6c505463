"""Bootstrap intervals: compared with full resampling and with scipy, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from priorclip.model import bootstrap as module
from priorclip.model.bootstrap import bootstrap_intervals


def test_equals_resampling_images_with_their_captions_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws, with the queries of an image repeated for each time that it is drawn."""
    monkeypatch.setattr(module, "CELLS", 37)  # a few resamples at a time
    rng = np.random.default_rng(0)
    counts = [3, 0, 1, 5, 2, 2]
    of = np.repeat(np.arange(6), counts)
    hits = {
        "i2t_r1": (rng.random(5), np.flatnonzero(counts)),
        "t2i_r1": (rng.random(len(of)), of),
    }
    found = bootstrap_intervals(hits, 6, resamples=300, seed=5)
    draws = np.random.default_rng(5)
    figures = []
    for _ in range(300):
        times = draws.multinomial(6, np.full(6, 1 / 6))
        figures.append([np.repeat(values, times[image]).mean() * 100 for values, image in hits.values()])
    both = np.array(figures)
    for name, values in zip(("i2t_r1", "t2i_r1", "mean_recall"), (both[:, 0], both[:, 1], both.mean(1))):
        assert found[name] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_equals_scipys_bootstrap_where_an_image_is_one_query() -> None:
    values = (np.random.default_rng(1).random(80) < 0.3).astype(float)
    ours = bootstrap_intervals({"top1": (values, np.arange(80))}, 80, resamples=8000, mean=None)["top1"]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=8000, method="percentile", rng=2).confidence_interval
    assert ours == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1.3)


def test_captions_of_an_image_count_as_one_draw() -> None:
    """Ten equal captions of an image say no more than one, so the interval must not shrink."""
    values = (np.random.default_rng(2).random(60) < 0.5).astype(float)
    one = bootstrap_intervals({"t2i_r1": (values, np.arange(60))}, 60)["t2i_r1"]
    ten = bootstrap_intervals({"t2i_r1": (np.repeat(values, 10), np.repeat(np.arange(60), 10))}, 60)["t2i_r1"]
    assert ten == pytest.approx(one)
    assert one[1] - one[0] > 20


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Test sets of 100 images with 3 captions whose success is strongly correlated."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        easy = rng.random(100) < 0.6
        values = np.where(rng.random((100, 3)) < 0.9, easy[:, None], ~easy[:, None]).astype(float)
        hits = {"t2i_r1": (values.flatten(), np.repeat(np.arange(100), 3))}
        low, high = bootstrap_intervals(hits, 100, 200)["t2i_r1"]
        held += low <= 100 * (0.6 * 0.9 + 0.4 * 0.1) <= high
    assert 0.89 < held / 200 < 0.995
