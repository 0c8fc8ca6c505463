"""Real trainings after stage one: scene prior, stage two from a stage-one export, closed domain."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from real_trainings import HELD_OUT, SMALL, metrics, run, run_well
from safetensors.torch import load_file

from priorclip.model.image_hits import read_image_hits


def check_test_images(run_folder: Path) -> None:
    """The file of the test images gives the figures of the report again, and its scenes are those of the images."""
    found = read_image_hits(run_folder / "test_images.csv")
    report = json.loads((run_folder / "report.json").read_text())
    assert found.figures() == pytest.approx(report["test"], abs=1e-9)
    assert len(set(found.keys)) == HELD_OUT
    assert len(set(found.scenes)) == 24
    assert found.captions.min() > 0
    assert found.sums.max() > 0


def test_prior_learns_scenes_and_is_used_by_stage_one(prior: Path, stage_one: Path) -> None:
    accuracy = list(metrics(prior, "train/accuracy").values())
    assert accuracy[-1] > accuracy[0] + 0.2
    assert json.loads((prior / "report.json").read_text())["evaluation"]["accuracy"] > 100 / 24
    assert len(json.loads((prior / "export" / "config.json").read_text())["classes"]) == 24
    trained = load_file(prior / "export" / "model.safetensors")
    used = load_file(stage_one / "export" / "model.safetensors")
    names = {name.removeprefix("backbone."): name for name in trained if name.startswith("backbone.model.")}
    assert names
    for inside, name in names.items():
        assert torch.equal(trained[name], used[f"prior.{inside}"]), f"{inside}: a frozen prior must not change"


def test_stage_two_starts_from_stage_one(data: Path, stage_one: Path, basic: list[object], tmp_path: Path) -> None:
    run_well("finetune", "instruct", *basic, "--data.image_size", 48, "--init_from", stage_one / "export",
             "--run.dir", tmp_path, "--run.epochs", 2, "--run.engine.global_batch", 32,
             "--data.caption_field", "captions", "--test.shards", data / "held-out", ranks=2)  # fmt: skip
    last_of_one, first_of_two = (
        list(metrics(stage_one, "train/contrastive").values())[-1],
        metrics(tmp_path, "train/contrastive")[1],
    )
    assert abs(first_of_two - last_of_one) < 0.6, "stage two must start from the weights of stage one"
    assert (tmp_path / "export" / "tokenizer.json").is_file()
    kept = json.loads((tmp_path / "export" / "config.json").read_text())
    assert kept["vision"]["name"] == "vit_tiny_patch16_224"
    check_test_images(tmp_path)


def test_closed_domain_trains_prior_itr(data: Path, basic: list[object], prior: Path, tmp_path: Path) -> None:
    run_well("finetune", "closed", "--preset", "prioritr-tiny", *basic, *SMALL, "--tokenizer", data / "tokenizer",
             "--model.prior.weights", prior / "export", "--run.dir", tmp_path, "--run.epochs", 4, "--model.belief.k", 2,
             "--model.text.context_length", 24, "--run.engine.global_batch", 32, "--run.engine.zero", 2,
             "--test.shards", data / "held-out")  # fmt: skip
    check_test_images(tmp_path)
    loss = list(metrics(tmp_path, "train/loss").values())
    assert sum(loss[-3:]) < 0.95 * sum(loss[:3])
    lr = list(metrics(tmp_path, "train/lr").values())
    falling = lr[3:]
    steps = [a - b for a, b in pairwise(falling)]
    assert max(steps) - min(steps) < 1e-8, "the paper's schedule is linear after the warm-up"
    report = json.loads((tmp_path / "report.json").read_text())
    assert "mean_recall" in report["evaluation"]


def test_a_scene_classifier_cannot_start_stage_two(prior: Path, basic: list[object], tmp_path: Path) -> None:
    done = run("finetune", "instruct", *basic, "--init_from", prior / "export", "--run.dir", tmp_path)
    assert done.returncode == 2
    assert "--model.prior.weights" in done.stderr
