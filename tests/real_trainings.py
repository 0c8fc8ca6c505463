"""Shards, tokenizer and commands for tests that run real trainings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from priorclip.common.launching import launch_command
from priorclip.data_shards.__main__ import main as data_shards

ROOT = Path(__file__).resolve().parents[1]
IMAGES, HELD_OUT = 96, 24

# A plain ViT has no batch statistics, so several ranks compute the same as one process.
VIT = ["--model.vision.name", "vit_tiny_patch16_224", "--model.vision.kwargs",
       '{"img_size": 48, "patch_size": 12, "embed_dim": 48, "depth": 2, "num_heads": 3}']  # fmt: skip
SMALL = ["--data.image_size", "48", "--model.vision.image_size", "48", "--model.prior.image_size", "48"]


def environment() -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def run(*words: object, ranks: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m WORDS``, or ``deepspeed --num_gpus RANKS --module WORDS`` if ``ranks`` is given."""
    module, *arguments = map(str, words)
    command = launch_command(module, arguments, ranks)
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    return done


def run_well(*words: object, ranks: int = 0) -> str:
    """Runs the command as ``run`` does. Returns its stdout; fails if its exit code is not 0."""
    done = run(*words, ranks=ranks)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def metrics(folder: Path, name: str) -> dict[int, float]:
    """Returns a figure of metrics.jsonl by step."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed synthetic scenes: ``train``, ``held-out``, and a ``tokenizer``."""
    folder = tmp_path_factory.mktemp("data")
    drawn = ["data_shards", "pack", "--source", "synthetic", "--size", 48, "--workers", 1, "--shard-size", 40]
    run_well(*drawn, "--count", IMAGES, "--output", folder / "train")
    run_well(*drawn, "--count", HELD_OUT, "--first-index", IMAGES, "--output", folder / "held-out")
    run_well("data_shards", "tokenizer", "--shards", folder / "train", "--output", folder / "tokenizer",
             "--vocab-size", 400, "--context-length", 24, "--caption-field", "captions,coarse_captions")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed synthetic scenes with masks and boxes: ``train`` and ``held-out``."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, count, first in (("train", 64, 0), ("held-out", 24, 64)):
        words = ["pack", "--source", "synthetic", "--size", "48", "--masks", "true", "--workers", "1"]
        numbers = ["--count", str(count), "--first-index", str(first), "--output", str(folder / name)]
        assert data_shards([*words, *numbers]) == 0
    return folder


@pytest.fixture(scope="session")
def basic(data: Path) -> list[object]:
    """Options of every training."""
    return ["--data.shards", data / "train", "--data.workers", 0, "--run.log_every", 1, "--run.progress", "false",
            "--run.optimizer.lr", "1e-3", "--evaluation.shards", data / "held-out"]  # fmt: skip


@pytest.fixture(scope="session")
def prior(data: Path, basic: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``finetune prior``."""
    folder = tmp_path_factory.mktemp("prior") / "run"
    run_well("finetune", "prior", *basic, "--run.dir", folder, "--run.epochs", 6, "--data.image_size", 48,
             "--backbone.name", "resnet10t", "--backbone.image_size", 48, "--run.engine.global_batch", 32,
             "--run.engine.zero", 0, "--backbone.kwargs", '{"channels": [24, 48, 96, 192], "stem_width": 16}',
             "--run.optimizer.lr", "3e-3")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def stage_one(data: Path, basic: list[object], prior: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage one on two ranks under ZeRO-2, with a ViT and the prior."""
    folder = tmp_path_factory.mktemp("stage-one") / "run"
    run_well("pretrain", *stage_one_words(data, basic, prior), "--run.dir", folder, ranks=2)
    return folder


def stage_one_words(data: Path, basic: list[object], prior: Path) -> list[object]:
    return ["--preset", "priorclip-tiny", *basic, *VIT, *SMALL, "--tokenizer", data / "tokenizer", "--run.epochs", 4,
            "--model.prior.weights", prior / "export", "--run.engine.global_batch", 32, "--loss.lambda_cs", 0.5,
            "--model.text.context_length", 24, "--run.checkpoint.every", 2]  # fmt: skip
