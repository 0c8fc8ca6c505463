"""Each long command writes its progress into a log that is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_galleries import TestSet

from priorclip.common import progress
from priorclip.data_shards.__main__ import main as data_shards
from priorclip.retrieval.__main__ import main as retrieval


def titles(caplog: pytest.LogCaptureFixture) -> set[str]:
    """The titles of the progress lines since the last call."""
    lines = [record.getMessage() for record in caplog.records if record.name == progress.__name__]
    caplog.clear()
    return {line.split(":")[0] for line in lines}


def test_each_long_command_writes_lines(
    test_set: TestSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", progress.__name__)
    monkeypatch.setattr(progress, "EVERY", 0.0005)
    data = ["--data", str(test_set.json), "--images", str(test_set.images), "--device", "cpu", "--batch_size", "4"]
    none = ["--bootstrap", "0"]
    model = ["--model", str(test_set.export)]
    assert retrieval(["index", *model, *data, "--output", str(tmp_path / "index")]) == 0
    assert "images" in titles(caplog)
    assert retrieval(["evaluate", *model, *data, *none, "--tasks", "retrieval,probe"]) == 0
    assert titles(caplog) >= {"images", "captions", "probe"}
    robustness = ["--corruptions", "jpeg", "--severities", "[1]", "--output", str(tmp_path / "robustness")]
    assert retrieval(["robustness", "--models", str(test_set.export), *data, *none, *robustness]) == 0
    assert titles(caplog) >= {"conditions", "images", "captions"}
    pack = ["--source", "karpathy", "--json", str(test_set.json), "--images", str(test_set.images)]
    shards = str(tmp_path / "shards")
    assert data_shards(["pack", *pack, "--output", shards, "--workers", "1"]) == 0
    assert "pack" in titles(caplog)
    assert data_shards(["verify", shards, "--workers", "1"]) == 0
    assert "verify" in titles(caplog)
    assert data_shards(["stats", shards, "--output", str(tmp_path / "stats"), "--workers", "1"]) == 0
    assert "stats" in titles(caplog)
