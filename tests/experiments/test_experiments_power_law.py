"""`experiments fit`: known laws come back, and the band holds what seeds do not agree on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import linregress

from priorclip.experiments.__main__ import main
from priorclip.experiments.power_law import PowerLaw, fit_power_law, fit_row
from priorclip.experiments.study import load_study
from priorclip.experiments.study_table import write_study

LEVELS = [250, 500, 1000, 2000, 4000, 7803]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.02, 0.8), st.floats(40, 99))
def test_a_known_exponent_comes_back(exponent: float, first: float) -> None:
    """Without noise exactly; scipy's regression of the logarithms gives the same line."""
    law = PowerLaw(first * LEVELS[0] ** exponent, exponent)
    figures = [float(law.figure(level)) for level in LEVELS]
    found = fit_power_law(LEVELS, figures)
    assert found == pytest.approx(law, rel=1e-8)
    line = linregress(np.log(LEVELS), np.log(100 - np.array(figures)))
    assert (found.exponent, np.log(found.scale)) == pytest.approx((-line.slope, line.intercept))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 1.5), st.floats(10, 40), st.floats(5, 50))
def test_a_known_floor_comes_back(exponent: float, scale: float, floor: float) -> None:
    law = PowerLaw(scale * LEVELS[0] ** exponent, exponent, floor)
    found = fit_power_law(LEVELS, law.figure(np.array(LEVELS)).tolist(), floor=True)
    assert found.exponent == pytest.approx(exponent, rel=1e-3)
    assert found.floor == pytest.approx(floor, rel=2e-2)
    assert float(found.figure(78030)) == pytest.approx(float(law.figure(78030)), abs=1e-2)


def noisy(seeds: int, spread: float, number: int = 0) -> dict[int, dict[float, float]]:
    law, rng = PowerLaw(95 * 250**0.2, 0.2), np.random.default_rng([1, number])
    shift = rng.normal(0, spread, seeds)
    return {
        seed: {float(n): float(law.figure(n) + shift[seed] + rng.normal(0, spread)) for n in LEVELS}
        for seed in range(seeds)
    }


def test_the_band_holds_the_truth_most_of_the_time() -> None:
    """20 made-up studies of 8 seeds. A bootstrap of few seeds is a little narrow, so not 19 of 20."""
    truth, held = float(PowerLaw(95 * 250**0.2, 0.2).figure(78030)), 0
    for number in range(20):
        fit = fit_row(noisy(8, 0.4, number), 60, 0, floor=False)
        assert fit["law"]["exponent"] == pytest.approx(0.2, abs=0.02)
        low, high = fit["prediction"]["interval"]
        held += low < truth < high
        assert high - low < 3
        assert fit["prediction"]["level"] == 78030
        assert fit["residual"] == pytest.approx(0.57, abs=0.3)  # of a shift and a noise of 0.4 each
    assert held >= 15


def test_seeds_that_agree_have_no_band_to_speak_of() -> None:
    runs = noisy(1, 0.4)
    same = fit_row(dict.fromkeys(range(4), runs[0]), 50, 0, floor=False)
    assert np.ptp(same["exponent_interval"]) < 1e-12
    assert same["law"] == pytest.approx(fit_row(runs, 50, 0, floor=False)["law"])
    assert "exponent_interval" not in fit_row(runs, 50, 0, floor=False)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a study with made-up runs, as a sweep writes it."""
    folder, study = tmp_path_factory.mktemp("fit"), load_study("scaling-images")
    runs = noisy(3, 0.3)
    results = {
        f"{level:g}": {
            row: {seed: {"mean_recall": runs[seed][level] + place} for seed in runs}
            for place, row in enumerate(list(study.rows)[:2])
        }
        for level in LEVELS
    }
    write_study(study, results, folder, "a note", "the command")
    return folder / "scaling-images.json"


def test_the_command_writes_table_and_plot(table: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", str(table), "--bootstrap", "100"]) == 0
    said = capsys.readouterr().out
    report = json.loads(table.with_name("scaling-images.fit.json").read_text())
    assert list(report["rows"]) == ["one-stage-no-prior", "one-stage-no-belief"]
    first = report["rows"]["one-stage-no-prior"]
    assert f"| no prior | {first['law']['exponent']:.3f} [" in said
    assert "mean recall at 78030" in said
    assert said == table.with_name("scaling-images.fit.md").read_text()
    low, high = (np.array(first["curve"][name]) for name in ("low", "high"))
    assert (low <= np.array(first["curve"]["figure"]) + 1e-6).all()
    assert (high >= np.array(first["curve"]["figure"]) - 1e-6).all()
    assert Image.open(table.with_name("scaling-images.fit.png")).size == (825, 550)
    assert main(["fit", str(table), "--floor", "true", "--bootstrap", "20", "--output", str(table.parent / "b/f")]) == 0
    assert (table.parent / "b" / "f.fit.png").is_file()


def test_what_cannot_be_fitted_is_refused(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture) -> None:
    def said(content: object, *options: str) -> str:
        path = tmp_path / "x.json"
        path.write_text(json.dumps(content))
        assert main(["fit", str(path), *options]) == 2
        return capsys.readouterr().err

    whole = json.loads(table.read_text())
    assert "x.json is not the table of a study" in said({"rows": 3})
    assert "x.json has no finished run" in said({**whole, "rows": {}})
    runs = {"runs": {"0": 20.0}}
    two = {**whole, "rows": {"one-stage-soft": {"250": runs, "500": runs}}}
    assert "with a floor needs 3 levels, not [250.0, 500.0]" in said(two, "--floor", "true")
    perfect = {**whole, "rows": {"one-stage-soft": {"0": {"runs": {"0": 20.0}}, "500": runs}}}
    assert "needs levels above 0 and figures below 100 percent" in said(perfect)
