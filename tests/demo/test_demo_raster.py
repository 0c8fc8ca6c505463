"""The demo on georeferenced scenes: its steps are commands that exist, and its check tells right places from wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.config import DemoConfig
from demo.raster_plan import SCENES, STRIDE, TILE, WANTED, raster_plan
from demo.reports import places_report, places_summary
from demo.steps import StepFailed
from priorclip.common.options import parse_command
from priorclip.data_shards.__main__ import COMMANDS as DATA
from priorclip.data_shards.__main__ import main as data_shards
from priorclip.retrieval.commands import COMMANDS as RETRIEVAL

SIDE = 2 * TILE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo up to its tiles: scenes of four places, cut."""
    folder = tmp_path_factory.mktemp("run")
    config = DemoConfig(source="raster", scene_size=SIDE, model="export", seed=2, train_images=23, test_images=0)
    steps = {step.name: step for step in raster_plan(config, folder)}
    assert list(steps) == ["scenes", "pack-tiles", "stats", "index", "search"]
    assert data_shards([*steps["scenes"].arguments, "--bands", "rgb"]) == 0
    assert data_shards([*steps["pack-tiles"].arguments, "--workers", "1"]) == 0
    return folder


def test_every_step_is_a_command_with_known_options(tmp_path: Path) -> None:
    steps = raster_plan(DemoConfig(source="raster"), tmp_path)
    assert [step.name for step in steps][:4] == ["pack-train", "pack-test", "tokenizer", "model"]
    for step in steps:
        if step.module in ("data_shards", "retrieval"):
            name, _ = parse_command(
                DATA if step.module == "data_shards" else RETRIEVAL,
                step.arguments,
                prog=step.module,
                description="",
                positional={"stats": "shards"} if step.module == "data_shards" else {},
            )
            assert name == step.arguments[0]


def answers(run: Path, wanted: int, others: int) -> None:
    """Writes found.geojson with tiles that show what was drawn, and tiles that do not."""
    features = json.loads((run / "scenes/places.geojson").read_text())["features"]
    right = [each for each in features if each["properties"]["label"] == WANTED]
    wrong = [each for each in features if each["properties"]["label"] != WANTED]
    assert len(right) == 1
    found = right * wanted + wrong[:others]
    (run / "found.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": found}))


def test_precision_counts_the_tiles_that_show_what_was_drawn(run: Path) -> None:
    config = DemoConfig(source="raster", seed=2)
    answers(run, 8, 2)
    report = places_report(run, config, 12.34)
    assert (report["precision_at_10"], report["query"], report["seconds"]) == (0.8, WANTED, 12.3)
    assert report["shares"] == [1.0] * 8 + [0.0] * 2
    assert (report["places"], report["places_of_it"]) == (SCENES * 4, 1)
    assert report["tiles"] == SCENES * ((SIDE - TILE) // STRIDE + 1) ** 2
    assert "80% of the 10 best of 27 tiles show it; chance 8.3% (1 of 12 places)" in places_summary(run, report)


def test_too_few_right_answers_end_the_demo(run: Path) -> None:
    answers(run, 6, 4)
    with pytest.raises(StepFailed, match="only 6 of the 10 best tiles show forest"):
        places_report(run, DemoConfig(source="raster"), 1.0)
