"""The studies of scaling: each level trains on its own subset, for as many steps as any other level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_experiments_files import parsed

from priorclip.data_shards.corpus import corpora
from priorclip.experiments.experiment import commands_of, load_data
from priorclip.experiments.study import Study, load_study, row_at_level

FOLDERS = {
    "scaling-images": "images",
    "scaling-scenes": "scenes",
    "long-tail": "tail",
    "captions-per-image": "captions",
}
SIZE = 7803  # RSICD's training images
SIZES = {"scaling-images": None, "scaling-scenes": 750, "long-tail": 500, "captions-per-image": SIZE}


def data_options(study: Study, level: float, tmp_path: Path, row: int = 0) -> dict[str, Any]:
    """The data options that a run of seed 2 gets."""
    part = row_at_level(study, level, study.experiments()[row], load_data("rsicd"), tmp_path, {})
    assert part.folder.name == f"{study.name}-{level:g}"
    ((_, words),) = commands_of(part.row, part.data, seed=2, run=tmp_path, extra=part.options)
    return vars(parsed(words).data)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_level_has_its_subset_and_as_many_samples_in_an_epoch(name: str, tmp_path: Path) -> None:
    study = load_study(name)
    for values in study.at.values():
        assert values.keys() == {f"{level:g}" for level in study.levels}
        assert all(abs(float(value) * float(level) - SIZE) < 0.5 for level, value in values.items())
    for level in (study.levels[0], study.levels[-1]):
        (corpus,) = corpora(data_options(study, level, tmp_path)["shards"])
        assert corpus.shards == [f"runs/evidence/rsicd/subsets/{FOLDERS[name]}-{level:g}/seed-2"]
        assert abs(corpus.weight * (SIZES[name] or level) - SIZE) < 0.5


def test_rows_against_the_long_tail(tmp_path: Path) -> None:
    study = load_study("long-tail")
    rows = list(study.rows)
    balanced = data_options(study, 1, tmp_path, rows.index("one-stage-no-belief-balanced"))
    plain = data_options(study, 1, tmp_path, rows.index("one-stage-no-belief"))
    assert {name for name in plain if plain[name] != balanced[name]} == {"balance"}
    assert balanced["balance"] == "scenes"


def test_a_level_without_a_value_is_named(tmp_path: Path) -> None:
    study = load_study("scaling-images")
    message = "'passes' has values for the levels 250, 500, .* not for 300: give one for all levels"
    with pytest.raises(ValueError, match=message):
        data_options(study, 300, tmp_path)
