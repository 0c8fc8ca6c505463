"""TensorBoard shows a run: a real server over HTTP, and its first page in a real browser."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from real_trainings import metrics
from tensorboard_page import Board, tensorboard

RUN = "tensorboard"  # name of the folder in the run directory
EPOCHS, STEPS = 4, 12
PARTS = ("vision", "text", "instruction", "heads", "scales")  # the prior is frozen


@pytest.fixture(scope="module")
def board(stage_one: Path) -> Iterator[Board]:
    with tensorboard(stage_one) as server:
        yield server


def test_scalars_over_http_are_those_of_metrics_jsonl(stage_one: Path, board: Board) -> None:
    tags = set(board.get("data/plugin/scalars/tags")[RUN])
    named = {
        "train": ("loss", "contrastive", "attribution", "grad_norm", "lr", "logit_scale", "images_per_second",
                  "data_wait_share"),
        "grad_norm": PARTS,
        "eval": ("mean_recall", "i2t_r1", "t2i_r10"),
        "speed": ("images_per_second_a_rank", "step_seconds_median", "step_seconds_slowest"),
        "straggler": ("rank", "lag_seconds", "lag_share"),
        "memory": ("host_rss_gb", "host_available_gb"),
    }  # fmt: skip
    for name in ["data/skipped", *(f"{group}/{name}" for group, names in named.items() for name in names)]:
        assert name in tags
        shown = {
            step: value for _, step, value in board.get(f"data/plugin/scalars/scalars?run={RUN}&tag={quote(name)}")
        }
        written = metrics(stage_one, name)
        assert shown == pytest.approx(written, rel=1e-6), name
        assert len(shown) == (EPOCHS if name.startswith("eval/") else STEPS)


def test_norms_of_the_parts_add_up_to_the_gradient_norm(stage_one: Path) -> None:
    parts = [metrics(stage_one, f"grad_norm/{part}") for part in PARTS]
    for step, whole in metrics(stage_one, "train/grad_norm").items():
        assert np.linalg.norm([part[step] for part in parts]) == pytest.approx(whole, rel=1e-4)
        assert all(part[step] > 0 for part in parts)


def test_pictures_of_every_evaluation_are_shown(board: Board) -> None:
    assert set(board.get("data/plugin/images/tags")[RUN]) == {"eval/belief", "eval/hard_negatives", "eval/similarity"}
    for tag in ("eval/belief", "eval/hard_negatives", "eval/similarity"):
        shown = board.get(f"data/plugin/images/images?run={RUN}&tag={quote(tag)}&sample=0")
        assert [each["step"] for each in shown] == [3, 6, 9, 12]
        picture = Image.open(io.BytesIO(board.read(f"data/plugin/images/individualImage?{shown[-1]['query']}")))
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100, tag


def test_histogram_text_hparams_and_layout(stage_one: Path, board: Board) -> None:
    histograms = board.get(f"data/plugin/histograms/histograms?run={RUN}&tag={quote('speed/step_seconds')}")
    assert [step for _, step, _ in histograms] == list(range(1, STEPS + 1))
    seconds = metrics(stage_one, "speed/step_seconds")[STEPS][0]
    low, high = histograms[-1][2][0][0], histograms[-1][2][-1][1]
    assert low <= seconds <= high

    config = board.get(f"data/plugin/text/text?run={RUN}&tag={quote('run/config/text_summary')}")[0]["text"]
    assert "global_batch: 32" in config
    command = board.get(f"data/plugin/text/text?run={RUN}&tag={quote('run/command/text_summary')}")[0]["text"]
    assert "--preset priorclip-tiny" in command

    request = {"experimentName": "", "colParams": [], "allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0,
               "sliceSize": 10}  # fmt: skip
    groups = json.loads(board.read("data/plugin/hparams/session_groups", request))["sessionGroups"]
    assert len(groups) == 1, "a finished run is one row of the table"
    assert groups[0]["hparams"]["run.engine.global_batch"] == 32
    assert groups[0]["hparams"]["preset"] == "priorclip-tiny"
    final = {each["name"]["tag"]: each["value"] for each in groups[0]["metricValues"]}
    assert final["eval/mean_recall"] == pytest.approx(metrics(stage_one, "eval/mean_recall")[STEPS], rel=1e-6)
    assert final["train/loss"] == pytest.approx(metrics(stage_one, "train/loss")[STEPS], rel=1e-6)

    layout = board.get("data/plugin/custom_scalars/layout")
    assert layout["category"][0]["title"] == "Is it healthy?"
    for chart in layout["category"][0]["chart"]:
        (pattern, *_) = chart["multiline"]["tag"]
        found = board.get(f"data/plugin/custom_scalars/scalars?run={RUN}&tag={quote(pattern)}")
        assert found["regex_valid"]
        assert found["tag_to_events"], f"the chart '{chart['title']}' is empty"


def test_first_page_in_a_browser_draws_the_curves(board: Board, tmp_path: Path) -> None:
    if shutil.which("chromium") is None and os.environ.get("CI") != "true":
        pytest.skip("chromium is not installed: apt-get install chromium")
    board.screenshot(tmp_path / "page.png")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    charts = picture[110:, 420:]  # without TensorBoard's bar and side panel, which have colours as well
    # Curves and their points have the colour of the first run. A row has three charts.
    curve = (charts[..., 0] - charts[..., 2] > 100) & (charts[..., 0] > 200)
    assert curve.sum() > 3000
    drawn = [
        bool(cell.sum() > 100)
        for band in np.array_split(curve[:915], 3, axis=0)
        for cell in np.array_split(band[:, :1035], 3, axis=1)
    ]
    assert drawn == [True] * 9
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200
