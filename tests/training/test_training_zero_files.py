"""DeepSpeed's JSON files by stage, name and path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from priorclip.training.config import EngineConfig, OptimizerConfig
from priorclip.training.engine.build import ZERO_FOLDER, deepspeed_settings, settings_file

ROOT = Path(__file__).resolve().parents[2]


def test_path_in_the_checkout_gives_the_settings_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """``cluster/zero`` is a link to the folder that ``run.engine.zero: 2`` reads."""
    monkeypatch.chdir(ROOT)
    by_path, by_stage = (
        deepspeed_settings(EngineConfig(zero=zero, global_batch=16), OptimizerConfig(), world_size=2)
        for zero in ("cluster/zero/zero2.json", "2")
    )
    assert by_path == by_stage
    assert by_path["zero_optimization"]["stage"] == 2


def test_path_of_the_checkout_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an installed wheel, whose users have such paths in their configurations."""
    monkeypatch.chdir(tmp_path)
    for path in ZERO_FOLDER.glob("*.json"):
        assert settings_file(f"cluster/zero/{path.name}") == path
    with pytest.raises(ValueError, match=r"'cluster/zero/zero9.json' is neither a ZeRO stage .* nor one of zero0"):
        settings_file("cluster/zero/zero9.json")
    with pytest.raises(ValueError, match="nor a DeepSpeed JSON"):
        settings_file("elsewhere/zero2.json")


def test_file_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "cluster" / "zero" / "zero2.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    monkeypatch.chdir(tmp_path)
    assert settings_file("cluster/zero/zero2.json").resolve() == own
