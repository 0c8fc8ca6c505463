"""Published figures: in the rows and in docs/published.md, each agrees with itself and with the benchmark's size."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from priorclip.experiments.experiment import Experiment, experiment_names, load_experiment
from priorclip.experiments.sweep_table import published

PAGE = Path(__file__).resolve().parents[2] / "docs" / "published.md"
RECALLS = [f"{side}_r{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)]
TEST_IMAGES = {"RSICD": 1093, "RSITMD": 452}  # of the benchmarks' own splits; each image has 5 captions
ROUNDING = 0.005  # percent: half of the last digit that is printed

Line = dict[str, Any]  # a line of the page's table: its model, benchmark, six recalls and mean recall


def benchmark_of(row: Experiment) -> str:
    return "RSICD" if "rsicd" in str(row.steps[-1].options.get("test", {})) else "RSITMD"


def rows_with_figures() -> list[Experiment]:
    return [row for row in map(load_experiment, experiment_names()) if isinstance(row.published, dict)]


def lines_of_the_page() -> list[Line]:
    """The lines of docs/published.md with six recalls: | model | benchmark | tuned on | a / b / c | d / e / f | m |."""
    three = r"([\d.]+) / ([\d.]+) / ([\d.]+)"
    line = re.compile(rf"^\| ([^|]+) \| (RSICD|RSITMD) \| [^|]+ \| {three} \| {three} \| ([\d.]+) \|", re.MULTILINE)
    return [
        {
            "model": model,
            "benchmark": benchmark,
            "mean_recall": float(mean),
            **dict(zip(RECALLS, map(float, six), strict=True)),
        }
        for model, benchmark, *six, mean in line.findall(PAGE.read_text())
    ]


def is_share_of(percent: float, count: int) -> bool:
    """Tells whether a printed percentage is a whole number of ``count``."""
    return abs(round(percent * count / 100) * 100 / count - percent) <= ROUNDING + 1e-9


@pytest.mark.parametrize("row", rows_with_figures(), ids=lambda row: row.name)
def test_figures_of_a_row(row: Experiment) -> None:
    """The mean is that of the six. A recall of images is a whole number of test images, so no direction is swapped."""
    given = [name for name in RECALLS if name in row.published]
    assert given == RECALLS or len(given) < 6
    assert set(row.published) <= {"mean_recall", "source", *RECALLS}
    if len(given) == 6:
        assert fmean(row.published[name] for name in RECALLS) == pytest.approx(row.published["mean_recall"], abs=0.02)
        images = TEST_IMAGES[benchmark_of(row)]
        for name in RECALLS:
            queries = images if name.startswith("i2t") else 5 * images
            assert is_share_of(row.published[name], queries), f"{name} {row.published[name]} is no share of {queries}"


def test_the_directions_of_pirs_baseline_cannot_be_swapped() -> None:
    """Some text-to-image recalls of PIR's Table 1 are no whole number of images. So they are recalls of captions."""
    for name in ("closed-baseline", "closed-baseline-rsicd"):
        row = load_experiment(name)
        images = TEST_IMAGES[benchmark_of(row)]
        assert not all(is_share_of(row.published[name], images) for name in RECALLS[3:])


def test_the_page_and_the_rows_agree() -> None:
    lines = lines_of_the_page()
    assert len(lines) >= 15
    for line in lines:
        assert fmean(line[name] for name in RECALLS) == pytest.approx(line["mean_recall"], abs=0.02), line["model"]
    known = {(line["benchmark"], *(line[name] for name in RECALLS)) for line in lines}
    for row in rows_with_figures():
        assert (benchmark_of(row), *(row.published[name] for name in RECALLS)) in known, row.name


def test_every_row_gives_a_figure_with_its_source_or_says_that_none_was_found() -> None:
    rows = [load_experiment(name) for name in experiment_names()]
    assert {row.name for row in rows_with_figures()} >= {"closed-full", "closed-baseline", "closed-baseline-rsicd"}
    texts = [row.published for row in rows if not isinstance(row.published, dict)]
    assert all("not found" in text or "control" in text for text in texts)
    assert not any("points" in text for text in texts), "the abstract gives percent, not points"


def test_a_published_cell_names_every_figure() -> None:
    text = published({"mean_recall": 1.5, "i2t_r1": 2.0, "i2t_r5": 3.0, "t2i_r10": 4.0, "source": "a page"})
    assert text == "mean recall 1.5, i2t R@1 2.0, i2t R@5 3.0, t2i R@10 4.0 (a page)"
