"""A run trains without importing torch's compiler, and its optimizer computes what torch's does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from toy_launches import execute, toy_arguments

from priorclip.training.engine.late_compiler import MUON, compiled_at_first_call, make_optimizer

# Runs toy_runs and names the modules that the process has at its end.
NAMING = (
    "import runpy, sys; runpy.run_module('tests.toy_runs', run_name='__main__', alter_sys=True); print(*sys.modules)"
)


def test_a_run_imports_no_compiler(tmp_path: Path) -> None:
    plan = tmp_path / "runs.json"
    options = ("--run.engine.zero", "2", "--run.epochs", "1", "--run.checkpoint.every", "4")
    plan.write_text(json.dumps([toy_arguments(tmp_path / "run", *options)]))
    done = execute([sys.executable, "-c", NAMING, str(plan)])
    assert json.loads(plan.with_suffix(".json.ended").read_text()) == [0], done.stdout
    imported = set(done.stdout.splitlines()[-1].split())
    assert {"torch", "deepspeed", MUON} <= imported, done.stdout
    assert not {"torch._dynamo", "torch._inductor", "timm", "transformers", "scipy", "distutils.ccompiler"} & imported


def test_steps_equal_torchs() -> None:
    def trained(make: object) -> tuple[list[torch.Tensor], list[str]]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = make(torch.optim.AdamW, model.parameters(), lr=0.1, fused=True)  # type: ignore[operator]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        called: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        optimizer.register_step_post_hook(lambda *_: called.append("after"))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            schedule.step()
        state = optimizer.state_dict()["state"]
        return [*model.parameters(), *(each["exp_avg_sq"] for each in state.values())], called

    ours, our_calls = trained(make_optimizer)
    theirs, their_calls = trained(lambda kind, *words, **options: kind(*words, **options))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert our_calls == their_calls == ["before", "after"] * 3


def test_a_function_is_compiled_once_at_its_first_call() -> None:
    compiled = []

    def compile_it(function: object) -> object:
        compiled.append(function)
        return lambda value: ("compiled", function(value))  # type: ignore[operator]

    double = compiled_at_first_call(compile_it)(lambda value: 2 * value)
    assert compiled == []
    assert [double(2), double(3)] == [("compiled", 4), ("compiled", 6)]
    assert len(compiled) == 1
