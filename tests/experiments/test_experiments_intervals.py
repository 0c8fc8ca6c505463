"""Intervals of a sweep's table: against a bootstrap that counts query by query, and cases with a known answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_sweeps import IMAGES, ROWS, random_hits, write_sweep

from priorclip.experiments.experiment import load_experiment
from priorclip.experiments.intervals import image_intervals, images_of
from priorclip.model.image_hits import FIGURES, ImageHits, image_hits

CAPTIONS = [3, 0, 1, 5, 2, 2, 5, 4]


def slow_mean_recall(runs: list[ImageHits], drawn: list[int]) -> float:
    """The mean recall of a list of images, in which an image can stand several times, and the mean over the seeds."""
    of_seeds = []
    for run in runs:
        figures = []
        for place, figure in enumerate(FIGURES):
            queries = [int(run.captions[image]) for image in drawn]
            asked = sum(min(1, count) if figure.startswith("i2t") else count for count in queries)
            figures.append(100 * sum(float(run.sums[place, image]) for image in drawn) / asked)
        of_seeds.append(sum(figures) / 6)
    return sum(of_seeds) / len(of_seeds)


def test_equals_a_bootstrap_image_by_image_with_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    images = {
        "one": {seed: random_hits(rng, CAPTIONS) for seed in (0, 1, 2)},
        "two": {seed: random_hits(rng, CAPTIONS, 0.7) for seed in (1, 2, 3)},
    }
    found = image_intervals(images, resamples=200)
    draws, one, two, less = np.random.default_rng(0), [], [], []
    for _ in range(200):
        times = draws.multinomial(8, np.full(8, 1 / 8))
        drawn = [image for image in range(8) for _ in range(times[image])]
        one.append(slow_mean_recall([images["one"][seed] for seed in (0, 1, 2)], drawn))
        two.append(slow_mean_recall([images["two"][seed] for seed in (1, 2, 3)], drawn))
        both = [slow_mean_recall([images[row][seed] for seed in (1, 2)], drawn) for row in ("two", "one")]
        less.append(both[0] - both[1])
    wanted = {("one", ""): one, ("two", ""): two, ("two", "one"): less, ("one", "two"): [-each for each in less]}
    assert set(found) == set(wanted)
    for pair, values in wanted.items():
        assert found[pair] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-9), pair


def test_known_answers() -> None:
    """400 images of which each finds everything or nothing: a binomial. A row that finds one quarter more of every
    image's queries has no uncertainty over the images, however much they differ."""
    easy = np.random.default_rng(1).permutation(400) < 200
    one_each = {f"{way}_r{k}": (easy * 0.75, np.arange(400)) for way in ("i2t", "t2i") for k in (1, 5, 10)}
    more = {figure: (values + 0.25, image) for figure, (values, image) in one_each.items()}
    keys = [str(image) for image in range(400)]
    images = {name: {0: image_hits(hits, keys, keys)} for name, hits in (("less", one_each), ("more", more))}
    found = image_intervals(images)
    half = 1.96 * 75 * np.sqrt(0.25 / 400)
    assert found["less", ""] == pytest.approx((37.5 - half, 37.5 + half), abs=0.35)
    assert found["more", "less"] == pytest.approx((25, 25), abs=1e-9)


def test_rows_on_other_images_are_not_compared() -> None:
    rng = np.random.default_rng(2)
    images = {name: {0: random_hits(rng, CAPTIONS)} for name in ("a", "b", "c")}
    images["b"][0] = replace_keys(images["b"][0])
    images["c"][1] = replace_keys(random_hits(rng, CAPTIONS))  # the seeds of a row differ: a split for each
    assert set(image_intervals(images, 50)) == {("a", ""), ("b", "")}


def replace_keys(hits: ImageHits) -> ImageHits:
    return hits._replace(keys=[f"other-{key}" for key in hits.keys])


def test_the_table_has_intervals_in_json_and_markdown(tmp_path: Path) -> None:
    table = write_sweep(tmp_path)
    rows = [load_experiment(name) for name in ROWS]
    results = {row["name"]: {int(seed): {"mean_recall": value} for seed, value in row["figures"]["mean_recall"][
        "runs"].items()} for row in table["rows"]}  # fmt: skip
    wanted = image_intervals(images_of(rows, results, tmp_path))
    second = json.loads((tmp_path / "made-up.json").read_text())["rows"][1]
    low, high = second["figures"]["mean_recall"]["interval"]
    assert (low, high) == pytest.approx(wanted["closed-full", ""])
    assert low < second["figures"]["mean_recall"]["mean"] < high
    worse, better = second["difference"]["interval"]
    assert (worse, better) == pytest.approx(wanted["closed-full", "closed-baseline"])
    assert worse < second["difference"]["mean"] < better
    text = (tmp_path / "made-up.md").read_text()
    figure, less = second["figures"]["mean_recall"], second["difference"]
    assert f"| {figure['mean']:.1f} ± {figure['spread']:.1f} [{low:.1f}, {high:.1f}] |" in text
    assert f"| {less['mean']:+.1f} ± {less['spread']:.1f} [{worse:.1f}, {better:.1f}] | 3 |" in text
    assert "95 % bootstrap interval over the test images" in text


def test_a_table_without_files_has_no_intervals(tmp_path: Path) -> None:
    table = write_sweep(tmp_path, images=False)
    assert all("interval" not in row["figures"]["mean_recall"] for row in table["rows"])
    text = (tmp_path / "made-up.md").read_text()
    assert "bootstrap" not in text
    assert "[" not in text.split("| |", 1)[1].split("Percent")[0]


def test_files_that_are_missing_or_of_another_run_leave_the_row_out(tmp_path: Path) -> None:
    table = write_sweep(tmp_path)
    rows = [load_experiment(name) for name in ROWS]
    results = {row["name"]: {int(seed): {"mean_recall": value} for seed, value in row["figures"]["mean_recall"][
        "runs"].items()} for row in table["rows"]}  # fmt: skip
    assert set(images_of(rows, results, tmp_path)) == set(ROWS)
    (tmp_path / ROWS[1] / "seed-1" / "closed" / "test_images.csv").unlink()
    results[ROWS[2]][0]["mean_recall"] += 0.01  # such as the mean of a cross-validation
    assert set(images_of(rows, results, tmp_path)) == {ROWS[0]}
    scenes = {**results, ROWS[0]: {0: {"accuracy": 90.0}}}
    assert images_of(rows[:1], scenes, tmp_path) == {}
    assert len(images_of(rows[:1], results, tmp_path)[ROWS[0]][0].keys) == IMAGES
