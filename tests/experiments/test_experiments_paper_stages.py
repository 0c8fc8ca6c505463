"""The authors' two stages, really trained: contrastive CLIP, then the frozen prior with the text encoder frozen."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from priorclip.experiments.commands import SweepConfig
from priorclip.experiments.experiment import commands_of, family, load_data
from priorclip.experiments.sweep import sweep

ROWS = ["open-paper-no-prior", "open-paper-soft"]


def write_data_file(data: Path, prior: Path, path: Path) -> None:
    """A small recipe on drawn scenes, with all parts trainable except what a row freezes."""
    common = {
        "data": {"image_size": 48, "workers": 0, "shards": "{train}"},
        "model": {"vision": {"image_size": 48}, "prior": {"image_size": 48}, "text": {"context_length": 24}},
        "run": {"epochs": 1, "evaluate_every": 0, "progress": False, "optimizer": {"lr": 1e-3},
                "engine": {"zero": "0", "global_batch": 32, "threads": 1}},
    }  # fmt: skip
    content = {
        "places": {"train": str(data / "train"), "prior": str(prior / "export")},
        "defaults": {
            "all": common,
            "pretrain": {"preset": "priorclip-tiny", "tokenizer": str(data / "tokenizer"), "loss": {"lambda_cs": 0.5}},
            "instruct": {"test": {"shards": str(data / "held-out")}, "loss": {"lambda_cs": 0.5}},
        },
    }
    path.write_text(yaml.safe_dump(content))


def test_the_authors_stages_train(data: Path, prior: Path, tmp_path: Path) -> None:
    write_data_file(data, prior, tmp_path / "own.yaml")
    config = SweepConfig(
        "open-paper", rows=ROWS, seeds=1, data=str(tmp_path / "own.yaml"), output=str(tmp_path / "out")
    )
    assert sweep(config) == 0
    plain, soft = (tmp_path / "out" / row / "seed-0" for row in ROWS)
    assert (soft / "pretrain").resolve() == plain / "pretrain", "both rows share one stage one"
    kinds = [json.loads((run / "export/config.json").read_text())["kind"]
             for run in (plain / "pretrain", plain / "instruct", soft / "instruct")]  # fmt: skip
    assert kinds == ["clip", "clip", "priorclip"]
    one, two = (load_file(soft / stage / "export" / "model.safetensors") for stage in ("pretrain", "instruct"))
    scenes = load_file(prior / "export" / "model.safetensors")
    assert not any(name.startswith("prior.") for name in one), "stage one has no prior"
    for name in (name for name in two if name.startswith("prior.")):
        assert torch.equal(two[name], scenes[f"backbone.{name.removeprefix('prior.')}"]), f"{name}: the prior is frozen"
    assert any(name.startswith("prior.") for name in two)
    text, vision = ([name for name in one if name.startswith(part)] for part in ("text.", "visual.encoder."))
    assert text
    assert all(torch.equal(one[name], two[name]) for name in text), "stage two must not tune the text encoder"
    assert not all(torch.equal(one[name], two[name]) for name in vision), "stage two tunes the vision encoder"
    losses = [json.loads(line) for line in (plain / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert any("train/contrastive" in record for record in losses)
    assert all(record.get("train/loss") == record.get("train/contrastive") for record in losses), "contrastive alone"


def test_the_stages_family_compares_one_stage_ours_and_theirs(tmp_path: Path) -> None:
    """Each of the three ways once without and once with the prior. Theirs differs from ours where the paper says so."""
    rows = family("stages")
    assert [row.name for row in rows] == ["one-stage-no-prior", "one-stage-soft", "open-no-prior", "open-soft",
                                          "open-paper-no-prior", "open-paper-soft"]  # fmt: skip
    words = [[each for _, each in commands_of(row, load_data("default"), seed=0, run=tmp_path)] for row in rows]
    assert [len(each) for each in words] == [1, 1, 2, 2, 2, 2]

    def value(command: list[str], option: str) -> str | None:
        return command[command.index(option) + 1] if option in command else None

    for (ours, our_two), (theirs, their_two) in ((words[2], words[4]), (words[3], words[5])):
        assert (value(ours, "--model.text.trainable"), value(our_two, "--model.text.trainable")) == (None, None)
        assert value(theirs, "--model.kind") == "clip"
        assert float(value(theirs, "--loss.lambda_cs") or 1) == 0
        assert value(their_two, "--model.text.trainable") == "false"
    assert [value(words[5][1], f"--model.{each}") for each in ("kind", "prior.trainable", "belief.mode")] == [
        "priorclip", "false", "soft"]  # fmt: skip
