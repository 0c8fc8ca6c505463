"""Toy runs on real ranks. The tests of a session share them, because a launch needs seconds for imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from priorclip.common.ports import free_port

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
BASE = ("--run.log_every", "1", "--run.engine.threads", "1", "--run.engine.global_batch", "16", "--run.epochs", "2",
        "--run.progress", "false", "--run.deterministic", "true", "--run.engine.timeout_minutes", "2")  # fmt: skip
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class ToyRun:
    """A run directory, and the run's exit code or the message of its error."""

    folder: Path
    ended: int | str = 0
    output: str = ""

    def records(self, name: str) -> dict[int, Any]:
        """Step -> value, for the records of metrics.jsonl that have this metric."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line[name] for line in lines if name in line}

    def losses(self) -> list[float]:
        return list(self.records("train/loss").values())

    def weights(self) -> dict[str, torch.Tensor]:
        import torch

        return torch.load(self.folder / "weights.pt", weights_only=True)


def environment() -> dict[str, str]:
    """This process's environment without variables of another launcher; ranks run on the CPU."""
    foreign = ("SLURM_", "OMPI_", "PMI", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def execute(
    command: Sequence[str], extra: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs the command, by default in the repository's root. All its output is in ``stdout``."""
    process = subprocess.Popen(
        command, cwd=cwd, env={**environment(), **(extra or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        for _ in range(2):  # at the first signal the ranks write a checkpoint, at the second they end
            process.terminate()
            time.sleep(5)
        process.kill()
        raise AssertionError(f"{command} did not end in {LIMIT_SECONDS} s:\n{process.communicate()[0]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def needed(program: str, package: str) -> str:
    """Path of the program. If it is missing, the test fails under CI=true (packages.txt) and is skipped otherwise."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{program} is missing: apt-get install {package}")
    if path is None:
        pytest.skip(f"{program} is not installed: apt-get install {package}")
    return path


def root_needed(why: str) -> None:
    """If the user is not root, the test fails under CI=true and is skipped otherwise."""
    if os.geteuid() != 0 and os.environ.get("CI") == "true":
        pytest.fail(f"root is needed {why}")
    if os.geteuid() != 0:
        pytest.skip(f"root is needed {why}")


def dying_with_us(command: Sequence[str]) -> list[str]:
    """The command, which the kernel kills when this process ends for any reason."""
    return [needed("setpriv", "util-linux"), "--pdeathsig", "KILL", *command]


def toy_arguments(folder: Path, *options: str) -> list[str]:
    return ["--run.dir", str(folder), *BASE, *options]


def run_toys(
    parent: Path, options: Mapping[str, Sequence[str]], launcher: Sequence[str] | None = None
) -> dict[str, ToyRun]:
    """Launches all these runs once, on two ranks unless ``launcher`` differs. Fails if the launch fails."""
    launcher = launcher or (PYTHON, "-m", "cluster", "launch", "--nproc", "2", "--", "tests.toy_runs")
    parent.mkdir(parents=True, exist_ok=True)
    plan = parent / "runs.json"
    plan.write_text(json.dumps([toy_arguments(parent / name, *words) for name, words in options.items()]))
    done = execute([*launcher, str(plan)])
    assert done.returncode == 0, done.stdout
    ended = json.loads(plan.with_suffix(".json.ended").read_text())
    return {name: ToyRun(parent / name, code, done.stdout) for name, code in zip(options, ended, strict=True)}


def assert_same(run: ToyRun, whole: ToyRun) -> None:
    """Asserts that weights, training metrics and evaluations are equal to the last bit."""
    import torch

    weights, expected = run.weights(), whole.weights()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    for name in ("train/loss", "train/grad_norm", "train/lr", "eval/mse"):
        assert run.records(name) == whole.records(name), name
    final, wanted = (json.loads((each.folder / "report.json").read_text()) for each in (run, whole))
    assert final["evaluation"] == wanted["evaluation"]
    assert final["steps"] == wanted["steps"]


WATCHED = ("--run.max_steps", "5")
STOPPABLE = ("--dropout", "0.2", "--batch_norm", "true", "--draws", "true", "--run.checkpoint.every", "4",
             "--run.checkpoint.keep", "3", "--run.engine.micro_batch", "4", "--run.engine.zero", "2")  # fmt: skip


# Like the training of the large presets: a frozen encoder, and bfloat16 with float32 masters.
HALF = ("--run.engine.precision", "bf16", "--frozen", "true", "--run.optimizer.lr", "5e-3")


# Initial loss scales (powers of 2). Gradients overflow in the first steps, as in large models with DeepSpeed's default;
# in the second run they overflow for more steps than an epoch has.
SCALES = {"scaled": 19, "unstepped": 24}


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """Runs on two ranks under the deepspeed launcher."""
    options: dict[str, Sequence[str]] = {f"zero{stage}": ("--run.engine.zero", str(stage)) for stage in range(4)}
    parent = tmp_path_factory.mktemp("toys")
    for name, power in SCALES.items():
        scaling = {"enabled": "auto", "initial_scale_power": power, "hysteresis": 1}
        # DeepSpeed's own default is a buffer of 500 million elements: 8 GB on each rank.
        zero = {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": "auto"}
        (parent / f"{name}.json").write_text(json.dumps({"fp16": scaling, "zero_optimization": zero}))
    for name in ("zero2-offload", "zero3-offload"):
        offload = ("--run.engine.zero", name, "--dropout", "0.2", "--run.checkpoint.every", "4")
        options |= {
            name: ("--run.engine.zero", name),
            f"{name}-whole": offload,
            f"{name}-part": (*offload, "--kill_at", "6"),
            f"{name}-again": (*offload, "--run.dir", str(parent / f"{name}-part")),
        }
    options |= {
        "bf16": ("--run.engine.precision", "bf16", "--run.epochs", "8", "--run.optimizer.lr", "5e-3"),
        "bf16-0": (*WATCHED, "--run.engine.precision", "bf16", "--run.engine.zero", "0"),
        "bf16-1": (*WATCHED, "--run.engine.precision", "bf16", "--run.engine.zero", "1"),
        "half2": (*HALF, "--run.engine.zero", "2"),
        "half3": (*HALF, "--run.engine.zero", "3"),
        "late-data": (*WATCHED, "--late", "data"),
        "late-forward": (*WATCHED, "--late", "forward"),
        "late-zero3": (*WATCHED, "--late", "forward", "--run.engine.zero", "3"),
        "scraped": ("--scrape_at", "9", "--run.log_every", "4", "--run.monitor.prometheus_port", str(free_port()),
                    "--run.monitor.peak_tflops", "1e-4"),
        **{name: ("--run.engine.precision", "fp16", "--run.engine.zero", str(parent / f"{name}.json"))
           for name in SCALES},
        "micro": ("--run.engine.micro_batch", "4",),
        "unclipped": ("--run.optimizer.clip_grad_norm", "0"),
        "nan": ("--nan_at", "7", "--run.checkpoint.every", "2", "--run.log_every", "10"),
        "whole": STOPPABLE,
        # The signal comes in the last step of an epoch, after which an evaluation is due, and in the last step of all.
        "at_epoch": (*STOPPABLE, "--kill_at", "5"),
        "at_end": (*STOPPABLE, "--kill_at", "11"),
        # It comes in a step whose results no rank waits for.
        "unseen": (*STOPPABLE, "--run.log_every", "100", "--kill_at", "8"),
        # It comes during the evaluation of the first epoch, and of the last, before the checkpoint.
        "amid": (*STOPPABLE, "--kill_in_evaluation", "6"),
        "amid_last": (*STOPPABLE, "--kill_in_evaluation", "12"),
    }  # fmt: skip
    return run_toys(parent, options)
