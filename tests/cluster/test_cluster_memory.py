"""Memory of DeepSpeed's ranks, measured with torch's allocator, against theory; the plan's estimate within 15 %."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_launches import PYTHON, execute

from priorclip.cluster.plan.memory import Setting, estimate_memory
from priorclip.cluster.plan.model_table import ModelTable, load_table

BUCKET, BATCH = 200_000, 16
PRESET = "priorclip-tiny"
CASES = [("0", False), ("1", False), ("2", False), ("2", True), ("3", False)]


@pytest.fixture(scope="module")
def table() -> ModelTable:
    return load_table(PRESET, "fp32")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict[str, Any]]:
    """Records of two ranks, by stage and checkpointing."""
    request: Path = tmp_path_factory.mktemp("memory") / "request.json"
    runs = [{"zero": zero, "batch": BATCH, "checkpointing": again, "bucket": BUCKET} for zero, again in CASES]
    request.write_text(json.dumps({"preset": PRESET, "runs": runs}))
    done = execute([PYTHON, "-m", "cluster", "launch", "--nproc", "2", "--", "benchmarks.rank_memory", str(request)])
    assert done.returncode == 0, done.stdout
    records = json.loads(request.with_suffix(".json.measured").read_text())
    return {(record["zero"], record["checkpointing"]): record for record in records}


def settings(zero: str, again: bool) -> Setting:
    return Setting(int(zero), 2, "fp32", BATCH, BATCH, checkpointing=again, bucket=BUCKET, buckets=1)


@pytest.mark.parametrize(("zero", "again"), CASES)
def test_states_have_the_size_of_theory(
    measured: dict[tuple[str, bool], dict[str, Any]], table: ModelTable, zero: str, again: bool
) -> None:
    record, theory = measured[zero, again], estimate_memory(table, settings(zero, again))
    for name in ("parameters", "gradients", "optimizer"):
        assert record[name] == pytest.approx(getattr(theory, name), rel=0.05), name


@pytest.mark.parametrize(("zero", "again"), CASES)
def test_peak_is_estimated_within_15_percent(
    measured: dict[tuple[str, bool], dict[str, Any]], table: ModelTable, zero: str, again: bool
) -> None:
    assert estimate_memory(table, settings(zero, again)).peak == pytest.approx(measured[zero, again]["peak"], rel=0.15)


def test_checkpointing_and_sharding_save_memory(measured: dict[tuple[str, bool], dict[str, Any]]) -> None:
    assert measured["2", True]["peak"] < measured["2", False]["peak"]
    assert measured["2", False]["optimizer"] < 0.8 * measured["0", False]["optimizer"]
    assert measured["3", False]["parameters"] < measured["2", False]["parameters"]
