"""run.engine.compile: the same training up to rounding, under ZeRO 3 with micro batches and an average; its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_launches import ToyRun, run_toys

from priorclip.training.engine.compiling import refuse_without_compiler

OPTIONS = ("--run.engine.zero", "3", "--run.engine.micro_batch", "4", "--run.average.decay", "0.9")
COMPILED = ("--run.engine.compile", "default")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    return run_toys(tmp_path_factory.mktemp("compiled"), {"plain": OPTIONS, "compiled": (*OPTIONS, *COMPILED)})


def test_a_compiled_run_trains_what_the_other_one_does(runs: dict[str, ToyRun]) -> None:
    plain, compiled = runs["plain"], runs["compiled"]
    assert (plain.ended, compiled.ended) == (0, 0), compiled.output
    assert compiled.losses() == pytest.approx(plain.losses(), rel=1e-5)
    assert len(compiled.losses()) == 12
    weights = compiled.weights()
    assert weights.keys() == plain.weights().keys()
    for part, value in plain.weights().items():
        torch.testing.assert_close(weights[part], value, rtol=1e-4, atol=1e-6)


def test_the_report_and_the_log_count_compilations(runs: dict[str, ToyRun]) -> None:
    assert "compile" not in json.loads((runs["plain"].folder / "report.json").read_text())
    counts = json.loads((runs["compiled"].folder / "report.json").read_text())["compile"]
    assert counts["graphs"] >= 1
    assert counts["seconds"] > 0
    assert "torch compiled piece 0 of the model in" in runs["compiled"].output


def test_a_machine_without_compiler_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"run\.engine\.compile needs the C\+\+ compiler no-such-compiler.*set it to off"
    ):
        refuse_without_compiler()
    monkeypatch.delenv("CXX")
    refuse_without_compiler()
    monkeypatch.setenv("PATH", str(Path("/nowhere")))
    with pytest.raises(ValueError, match=r"g\+\+ on a CPU: install g\+\+"):
        refuse_without_compiler()
