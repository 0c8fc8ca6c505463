"""Tables of sweeps and studies: mean and spread, paired differences, folds of a cross-validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from priorclip.experiments.commands import ResplitConfig, SweepConfig
from priorclip.experiments.experiment import load_experiment
from priorclip.experiments.study import Study
from priorclip.experiments.study_table import write_study
from priorclip.experiments.sweep import average_folds
from priorclip.experiments.sweep_table import plus_minus, summary, write_table


def test_spread_and_paired_differences(tmp_path: Path) -> None:
    """Each seed shifts both rows by the same amount, so the paired difference has no spread."""
    rows = [load_experiment("closed-baseline"), load_experiment("closed-full"), load_experiment("closed-soft")]
    results = {
        rows[0].name: {s: {"mean_recall": 50.0 + s} for s in range(3)},
        rows[1].name: {s: {"mean_recall": 54.5 + s} for s in range(1, 4)},
        rows[2].name: {},
    }
    found = summary(rows[1], rows, results)
    assert found["figures"]["mean_recall"]["mean"] == pytest.approx(56.5)
    assert found["figures"]["mean_recall"]["spread"] == pytest.approx(1.0)
    assert found["difference"] == {"mean": pytest.approx(4.5), "spread": pytest.approx(0.0), "count": 2}
    write_table("t", rows, results, tmp_path, "a note", "the command")
    text = (tmp_path / "t.md").read_text()
    assert "| 56.5 ± 1.0 | +4.5 ± 0.0 | 3 |" in text
    other = load_experiment("closed-full-rsicd")  # tested on other images, so there is no difference
    alone = summary(other, [rows[1], other], {**results, other.name: {1: {"mean_recall": 40.0}}})
    assert alone["difference"] is None
    assert plus_minus(alone["figures"]["mean_recall"]) == "40.0", "one run has no spread"
    scenes = {**results, rows[2].name: {2: {"accuracy": 75.0}}}  # a scene prior in a family of retrieval models
    assert summary(rows[2], rows, scenes)["difference"] is None
    write_table("mixed", rows, scenes, tmp_path, "", "the command")
    assert "|  | 75.0 |  | 1 |" in (tmp_path / "mixed.md").read_text()
    assert "38.24" in text
    assert "the command" in text
    assert "closed-soft" in text
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_a_study_pairs_seeds_at_each_level(tmp_path: Path) -> None:
    """A level costs 10 points without prior and 8 with it. The splits are 1 point apart; one run is missing."""
    study = Study("why", "noise", [0, 0.5], {"plain": "no prior", "soft": "soft belief"}, ["plain"], {}, name="noise")
    recall = {"plain": lambda place, seed: 70.0 - 10 * place + seed, "soft": lambda place, seed: 70 - 8 * place + seed}
    results = {
        level: {
            row: {seed: {"mean_recall": of(place, seed)} for seed in range(3) if (row, level, seed) != ("soft", "0", 2)}
            for row, of in recall.items()
        }
        for place, level in enumerate(["0", "0.5"])
    }
    on_tail = {"plain": {0: {"mean_recall": 5.0}}, "soft": {0: {"mean_recall": 6.0}}}
    table = write_study(study, results, tmp_path, "a note", "the command", {"tail": dict.fromkeys(results, on_tail)})
    assert table["parts"]["tail"]["against"]["plain"]["soft"]["0.5"]["runs"] == {0: 1.0}
    assert table["rows"]["plain"]["0"]["runs"] == {0: 70, 1: 71, 2: 72}
    gain = table["against"]["plain"]["soft"]
    assert (gain["0"]["mean"], gain["0"]["count"], gain["0.5"]["mean"], gain["0.5"]["count"]) == (0, 2, 2, 3)
    assert (gain["change"]["mean"], gain["change"]["spread"], gain["change"]["count"]) == (2, 0, 2)
    text = (tmp_path / "noise.md").read_text()
    assert "| 0 | 71.0 ± 1.0 (3) | 70.5 ± 0.7 (2) |" in text
    assert "| 0.5 less 0 | -10.0 ± 0.0 (0/3) | -8.0 ± 0.0 (0/2) |" in text
    assert "| less 'no prior' | soft belief |" in text
    assert "| 0.5 | +2.0 ± 0.0 (3/3) |" in text
    assert "| tail, noise | no prior | soft belief |" in text
    assert "| tail, less 'no prior' | soft belief |" in text
    assert (tmp_path / "noise.png").stat().st_size > 5000


def test_a_cross_validation_is_one_figure() -> None:
    runs = {seed: {"mean_recall": float(seed), "classes": {}} for seed in (4, 5, 6, 7, 8)}
    config = SweepConfig(name="belief", seeds=6, first_seed=4, folds=3)
    assert average_folds(runs, config) == {0: {"mean_recall": 5.0}}, "the second cross-validation lacks a split"
    assert average_folds(runs, SweepConfig(name="belief", seeds=6, first_seed=4)) == runs
    with pytest.raises(ValueError, match="--seeds 5 must be a multiple of --folds 3"):
        SweepConfig(name="belief", seeds=5, folds=3)
    with pytest.raises(ValueError, match="--train 0 must be a share"):
        ResplitConfig(json="a.json", output="b", train=0)
