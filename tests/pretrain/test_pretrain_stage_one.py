"""Real trainings of stage one: two DeepSpeed ranks, packed shards, resumes, ZeRO 3 and bfloat16."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from real_trainings import HELD_OUT, IMAGES, ROOT, SMALL, VIT, environment, metrics, run, run_well, stage_one_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 4 * (IMAGES // 32)


def test_run_directory_has_all_files(stage_one: Path) -> None:
    report = json.loads((stage_one / "report.json").read_text())
    assert (report["steps"], report["world_size"], report["zero_stage"]) == (STEPS, 2, 2)
    assert report["images_per_second"] > 0
    assert yaml.safe_load((stage_one / "config.yaml").read_text())["run"]["engine"]["global_batch"] == 32
    assert list((stage_one / "tensorboard").glob("events*"))
    board = EventAccumulator(str(stage_one / "tensorboard"), size_guidance={"images": 0})
    pictures = board.Reload().Images("eval/belief")
    assert [picture.step for picture in pictures] == [STEPS // 4 * epoch for epoch in (1, 2, 3, 4)]
    assert (pictures[0].width, pictures[0].height) == (8 * 52 - 4, 100)
    checkpoints = stage_one / "checkpoints"
    assert (checkpoints / "latest").read_text() == f"step_{STEPS:08d}"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == [f"step_{STEPS - 2:08d}", f"step_{STEPS:08d}"]


def test_metrics_have_every_figure_of_every_step(stage_one: Path) -> None:
    names = ("loss", "contrastive", "attribution", "lr", "grad_norm", "logit_scale", "images_per_second",
             "data_wait_share", "epoch")  # fmt: skip
    for name in names:
        values = metrics(stage_one, f"train/{name}")
        assert list(values) == list(range(1, STEPS + 1)), name
        assert all(value is not None for value in values.values()), name
    loss = list(metrics(stage_one, "train/loss").values())
    assert sum(loss[-3:]) < sum(loss[:3]) * 0.95
    contrastive, attribution = metrics(stage_one, "train/contrastive"), metrics(stage_one, "train/attribution")
    assert loss[0] == pytest.approx(contrastive[1] + 0.5 * attribution[1], rel=1e-5)
    assert len(metrics(stage_one, "eval/mean_recall")) == 4


def test_one_process_and_two_ranks_compute_the_same(
    stage_one: Path, data: Path, basic: list[object], prior: Path, tmp_path: Path
) -> None:
    run_well("pretrain", *stage_one_words(data, basic, prior), "--run.dir", tmp_path, "--run.engine.zero", 0)
    alone, together = metrics(tmp_path, "train/loss"), metrics(stage_one, "train/loss")
    assert together == pytest.approx(alone, rel=2e-4)
    assert metrics(stage_one, "train/grad_norm")[1] == pytest.approx(metrics(tmp_path, "train/grad_norm")[1], rel=1e-3)


def test_killed_run_resumes_with_the_same_figures(
    stage_one: Path, data: Path, basic: list[object], prior: Path, tmp_path: Path
) -> None:
    words = stage_one_words(data, basic, prior)
    words = ["pretrain", *words, "--run.dir", tmp_path, "--run.engine.threads", 1, "--run.deterministic", "true"]
    run_well(*words[:-4], "--run.dir", tmp_path / "whole", *words[-4:])

    cut = tmp_path / "cut"
    command = [sys.executable, "-m", *map(str, [*words, "--run.dir", cut])]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (cut / "checkpoints" / "step_00000004").is_dir() and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if process.returncode == 0:
        pytest.fail("the run ended before the kill: give it more steps")

    run_well(*words, "--run.dir", cut)
    assert metrics(cut, "train/loss") == metrics(tmp_path / "whole", "train/loss")
    assert metrics(cut, "eval/mean_recall") == metrics(tmp_path / "whole", "eval/mean_recall")


def test_export_has_the_recall_of_the_report(stage_one: Path, data: Path, tmp_path: Path) -> None:
    run_well("retrieval", "evaluate", "--model", stage_one / "export", "--data", data / "held-out",
             "--output", tmp_path / "recall.json")  # fmt: skip
    recall = json.loads((tmp_path / "recall.json").read_text())
    assert recall["images"] == HELD_OUT
    assert recall["mean_recall"] == pytest.approx(
        json.loads((stage_one / "report.json").read_text())["evaluation"]["mean_recall"]
    )


def test_zero_3_bfloat16_recomputation_accumulation_and_sigmoid_loss(
    data: Path, basic: list[object], prior: Path, tmp_path: Path
) -> None:
    words = stage_one_words(data, basic, prior)
    run_well("pretrain", *words, "--run.dir", tmp_path, "--run.max_steps", 3, "--run.engine.zero", 3,
             "--run.engine.precision", "bf16", "--run.engine.grad_checkpointing", "true",
             "--run.engine.micro_batch", 8, "--loss.kind", "sigmoid", "--loss.equal_captions", "ignored",
             ranks=2)  # fmt: skip
    from priorclip.model import from_pretrained

    model = from_pretrained(tmp_path / "export")
    features = model(images=torch.zeros(1, 3, 48, 48, dtype=torch.uint8))["image_features"]
    assert features.dtype == torch.float32
    assert features.norm().item() == pytest.approx(1, abs=1e-5)
    bias = model.logit_bias
    assert bias is not None
    assert -10 < bias.item() < -9.9, "the first steps make pairs likelier, because too few were taken for right"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["zero_stage"], report["precision"], report["steps"]) == (3, "bf16", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.imagesize", "48"], "did you mean 'data.image_size'?"),
        (["--preset", "priorclip-tinny"], "did you mean 'priorclip-tiny'?"),
        (["--run.engine.global_batch", "1000"], "1000"),
        (["--data.shards", "/nowhere/shards"], "/nowhere/shards"),
        (["--init_from", "/nowhere/export"], "/nowhere/export"),
    ],
)
def test_bad_input_is_named(words: list[str], message: str, data: Path, tmp_path: Path) -> None:
    base = [
        "pretrain",
        "--preset",
        "priorclip-tiny",
        *VIT,
        *SMALL,
        "--data.shards",
        data / "train",
        "--data.workers",
        0,
    ]
    done = run(*base, "--tokenizer", data / "tokenizer", "--run.dir", tmp_path, *words)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
