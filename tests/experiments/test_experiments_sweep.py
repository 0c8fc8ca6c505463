"""Sweeps: a small study really trains, and no training runs twice."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import pytest
import yaml
from real_trainings import run_well

from priorclip.experiments.commands import SweepConfig
from priorclip.experiments.experiment import commands_of, family, load_data
from priorclip.experiments.sweep import Command, find_repeated, finished, run_plans, sweep


def test_a_run_that_failed_at_once_does_not_hold_its_folder(tmp_path: Path) -> None:
    """A misspelt option leaves a folder that holds the command. The sweep with the right option goes on there."""
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "sweep.json").write_text(
        json.dumps(["finetune", "closed", "--run.dir", str(folder), "--run.epohcs", "2"])
    )
    mended = ["finetune", "closed", "--run.dir", str(folder), "--run.epochs", "2"]
    assert not finished(folder, mended)
    (folder / "checkpoints/step-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="other options"):
        finished(folder, mended)


def test_rows_share_one_pretraining(tmp_path: Path) -> None:
    data = load_data("default")

    def plans(name: str) -> list[list[Command]]:
        return [commands_of(row, data, seed=seed, run=tmp_path / row.name / str(seed))
                for seed in (0, 1) for row in family(name)]  # fmt: skip

    rows = [row.name for row in family("open")]
    same = find_repeated(plans("open"))
    assert {folder: original for folder, (original, _) in same.items()} == {
        tmp_path / name / seed / "pretrain": tmp_path / rows[0] / seed / "pretrain"
        for name in rows[1:]
        for seed in "01"
    }
    assert not find_repeated(plans("belief-open")), "each has its own pretraining"
    (tmp_path / rows[1] / "0" / "pretrain").mkdir(parents=True)
    assert len(find_repeated(plans("open"))) == len(same) - 1, "a finished pretraining is not replaced"
    # The first row has its report already: the third row gets a link to it, and nothing is deleted.
    (folder, words), (other, others) = plans("open")[0][0], plans("open")[2][0]
    (folder / "export").mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    (folder / "sweep.json").write_text(json.dumps(words))
    for _ in range(2):
        begun = {folder: [(folder, words)], other: [(other, others)]}
        assert not run_plans(begun, SweepConfig("open", keep="report"), find_repeated(plans("open")))
        assert other.is_symlink()
        assert (other / "export").is_dir()
    # The same for a sweep of the third row alone, because its folder is that link.
    assert not run_plans({other: [(other, others)]}, SweepConfig("open"))
    with pytest.raises(ValueError, match="other options"):
        run_plans({other: [(other, [*others, "--run.epochs", "1"])]}, SweepConfig("open"))


def test_a_study_runs_and_shares_its_clean_level_with_the_family(data: Path, prior: Path, tmp_path: Path) -> None:
    """Two rows at two levels of caption noise, on synthetic scenes, with its own data file."""
    places = {
        "places": {
            "train": str(data / "train"), "test": str(data / "held-out"), "prior": str(prior / "export"),
            "open_preset": "priorclip-tiny",
        },
        "tokens": 4,
        "defaults": {
            "closed": {
                "tokenizer": str(data / "tokenizer"),
                "data": {"shards": "{train}", "image_size": 48, "workers": 0},
                "test": {"shards": "{test}"},
                "model": {
                    "vision": {"image_size": 48, "trainable": False, "remember": str(tmp_path / "features")},
                    "prior": {"image_size": 48, "weights": "{prior}"}, "text": {"context_length": 24},
                },
                "run": {"epochs": 1, "evaluate_every": 0, "progress": False,
                        "engine": {"zero": "0", "global_batch": 32, "threads": 1}},
            }
        },
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(places))
    words = ["finetune", "sweep", "caption-noise", "--rows", "[one-stage-no-prior,one-stage-hard]", "--keep", "export",
             "--levels", "[0,0.5]", "--seeds", 1, "--data", tmp_path / "own.yaml", "--output", tmp_path / "out",
    ]  # fmt: skip
    shown = run_well(*words, "--dry-run").splitlines()
    assert len(shown) == 4
    assert all(shlex.split(line)[1:4] == ["-m", "priorclip.finetune", "closed"] for line in shown)
    run_well(*words)
    table = json.loads((tmp_path / "out" / "caption-noise.json").read_text())
    assert list(table["rows"]) == ["one-stage-no-prior", "one-stage-hard"]
    for row, level, part in itertools.product(table["rows"], ("0", "0.5"), ("clean", "caption-noise-0.5")):
        if (level == "0") == (part == "clean"):
            folder = tmp_path / "out" / part / row / "seed-0/closed"
            report = json.loads((folder / "report.json").read_text())
            assert table["rows"][row][level]["runs"] == {"0": report["test"]["mean_recall"]}
            assert ("50 % of the samples get the captions" in folder.with_suffix(".log").read_text()) == (
                level == "0.5"
            )
            assert (folder / "export" / "model.safetensors").is_file()
            assert not (folder / "checkpoints").exists()
    assert list((tmp_path / "features").rglob("*.safetensors"))

    folder = tmp_path / "out/clean/one-stage-hard/seed-0/closed"
    family_of_clean = SweepConfig(
        "belief-one-stage", rows=["one-stage-no-prior", "one-stage-hard"], seeds=1, data=str(tmp_path / "own.yaml"),
        output=str(tmp_path / "out/clean"),
    )  # fmt: skip
    written, length = (folder / "report.json").stat().st_mtime_ns, folder.with_suffix(".log").stat().st_size
    assert sweep(family_of_clean) == 0
    assert (folder / "report.json").stat().st_mtime_ns == written
    assert folder.with_suffix(".log").stat().st_size == length
    found = json.loads((tmp_path / "out/clean/belief-one-stage.json").read_text())
    assert [row["name"] for row in found["rows"]] == list(table["rows"])
    assert found["rows"][1]["figures"]["mean_recall"]["runs"] == table["rows"]["one-stage-hard"]["0"]["runs"]

    # --keep report keeps the prior of a level, because all runs of the level need it.
    recipe = {
        "run": {
            "dir": "none",
            "epochs": 1,
            "evaluate_every": 0,
            "engine": {"zero": "0", "global_batch": 32, "threads": 1},
        },
        "data": {"shards": str(data / "train"), "image_size": 48, "workers": 0},
        "backbone": yaml.safe_load((prior / "config.yaml").read_text())["backbone"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places["places"]["scene_recipe"] = str(tmp_path / "recipe.yaml")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(places))
    taught = SweepConfig(
        "prior-noise", rows=["one-stage-soft"], levels=[0.5], seeds=1, keep="report", data=str(tmp_path / "own.yaml"),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    assert sweep(taught) == 0
    assert (tmp_path / "out/prior-noise-0.5/prior/export").is_dir()
    assert not (tmp_path / "out/prior-noise-0.5/one-stage-soft/seed-0/closed/export").exists()

    family_of_clean.options = {"run": {"epochs": 2}}
    with pytest.raises(ValueError, match="other options"):
        sweep(family_of_clean)
