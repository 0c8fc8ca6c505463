"""Options that follow from others: ``data.image_size`` from the model, ``data.quarantine`` from the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from real_trainings import ROOT

from priorclip.common.options import parse, parse_command
from priorclip.finetune.commands import COMMANDS, DEFAULTS
from priorclip.pretrain.commands import PretrainConfig, model_defaults
from priorclip.training.run_folder import to_yaml

STORED = ROOT / "tests/stored/v0.1/run"
# Command -> the options that it needs, and the option that holds the image size of its model.
TRAININGS = {
    "pretrain": ([], "model.vision.image_size"),
    "prior": ([], "backbone.image_size"),
    "instruct": (["--init_from", str(STORED / "export")], "model.vision.image_size"),
    "closed": (["--preset", "prioritr-tiny"], "model.vision.image_size"),
}


def parsed(command: str, *words: object) -> Any:
    """The configuration of a real command line."""
    given = list(map(str, words))
    if command == "pretrain":
        return parse(PretrainConfig, given, prog="pretrain", defaults=model_defaults)
    return parse_command(COMMANDS, [command, *given], prog="finetune", defaults=DEFAULTS)[1]


def image_size(config: Any, option: str) -> int:
    for name in option.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("command", TRAININGS)
def test_image_size_and_quarantine_follow(command: str) -> None:
    needed, option = TRAININGS[command]
    words = [*needed, "--run.dir", "runs/x", "--data.shards", "shards"]
    config = parsed(command, *words)
    assert config.data.image_size == image_size(config, option)
    assert config.data.quarantine == "runs/x/quarantine.jsonl"
    assert parsed(command, *words, f"--{option}", 96).data.image_size == 96


@pytest.mark.parametrize("command", TRAININGS)
def test_explicit_values_win(command: str, tmp_path: Path) -> None:
    needed, option = TRAININGS[command]
    words = [*needed, "--run.dir", "runs/x", "--data.shards", "shards", f"--{option}", 96]
    config = parsed(command, *words, "--data.image_size", 64, "--data.quarantine", "bad.jsonl")
    assert (config.data.image_size, config.data.quarantine) == (64, "bad.jsonl")
    (tmp_path / "own.yaml").write_text("data: {image_size: 64, quarantine: bad.jsonl}")
    config = parsed(command, "--config", tmp_path / "own.yaml", *words)
    assert (config.data.image_size, config.data.quarantine) == (64, "bad.jsonl")
    assert image_size(config, option) == 96


def test_preset_and_export_decide_the_image_size() -> None:
    words = ["--run.dir", "x", "--data.shards", "shards"]
    for preset in ("priorclip-b32", "priorclip-tiny"):
        values = yaml.safe_load((ROOT / f"model/presets/{preset}.yaml").read_text())
        assert parsed("pretrain", "--preset", preset, *words).data.image_size == values["vision"]["image_size"]
    assert parsed("instruct", "--init_from", STORED / "export", *words).data.image_size == 32


def test_config_yaml_of_an_older_version_loads_unchanged() -> None:
    """Version 0.1 wrote the image size in three places, and null for the quarantine file in the run directory."""
    written = yaml.safe_load((STORED / "config.yaml").read_text())
    read = yaml.safe_load(to_yaml(parsed("pretrain", "--config", STORED / "config.yaml")))
    assert (written["data"]["image_size"], written["data"].pop("quarantine")) == (32, None)
    assert read["data"].pop("quarantine") == "run/quarantine.jsonl"
    assert contained(written, read) == written
    bigger = parsed("pretrain", "--config", STORED / "config.yaml", "--model.vision.image_size", 64)
    assert bigger.data.image_size == 32


def test_config_yaml_with_what_followed_loads_unchanged(tmp_path: Path) -> None:
    config = parsed("pretrain", "--run.dir", "runs/x", "--data.shards", "shards", "--preset", "priorclip-tiny")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parsed("pretrain", "--config", tmp_path / "config.yaml") == config


def contained(wanted: Any, found: Any) -> Any:
    """The keys of ``wanted`` with the values of ``found``, because a newer version may have more options."""
    if not isinstance(wanted, dict) or not isinstance(found, dict):
        return found
    return {name: contained(value, found[name]) for name, value in wanted.items()}
