"""The demo as a user runs it, on few scenes: every step, the report, and the message of a step that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.__main__ import keep_previous
from demo.steps import Step, StepFailed, run_steps

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo on 256 training scenes and 24 test scenes, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    words = ["--dir", str(folder), "--train-images", "256", "--test-images", "24", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "demo", *words], cwd=ROOT, capture_output=True, text=True, timeout=400, env=os.environ
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_report_has_the_figures_of_every_stage(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    report = json.loads((folder / "report.json").read_text())
    assert (report["images"], report["captions"]) == (24, 120)
    assert report["chance"]["t2i_r10"] == pytest.approx(100 * 10 / 24)
    for stage in ("stage_one", "stage_two"):
        own = json.loads((folder / stage.replace("_", "-") / "recall.json").read_text())
        assert report[stage]["mean_recall"] == own["mean_recall"]
        assert 0 <= report[stage]["mean_recall"] <= 100
    assert report["pretrain"]["world_size"] == 2
    assert report["pretrain"]["zero_stage"] == 2
    assert report["pretrain"]["images_per_second"] > 0


def test_folder_and_last_words_lead_on(demo: tuple[Path, str]) -> None:
    folder, said = demo
    for name in ("export/model.safetensors", "export/tokenizer.json", "stats/contact_sheet.png", "logs/prior.log"):
        assert (folder / name).is_file(), name
    for words in ("chance", "after stage one", "after stage two", f"tensorboard --logdir {folder}", "Try next"):
        assert words in said, words
    assert "[WARNING] [" not in said


def test_failing_step_is_named_with_its_log(tmp_path: Path) -> None:
    steps = [
        Step("good", "a step that works", "data_shards", ("--help",)),
        Step("bad", "a step that does not", "data_shards", ("stats", str(tmp_path / "nothing"))),
        Step("never", "a step after it", "data_shards", ("--help",)),
    ]
    with pytest.raises(StepFailed, match=r"'bad' ended with code 2.*bad\.log"):
        run_steps(steps, tmp_path)
    assert "nothing" in (tmp_path / "logs" / "bad.log").read_text()
    assert not (tmp_path / "logs" / "never.log").exists()


def test_earlier_demo_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    for text in ("first", "second"):
        keep_previous(folder)
        (folder / "report.json").write_text(text)
    keep_previous(folder)
    assert (tmp_path / "demo.previous" / "report.json").read_text() == "second"
    assert not list(folder.iterdir())
