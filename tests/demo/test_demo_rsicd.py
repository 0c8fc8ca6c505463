"""`make rsicd` on a small set in RSICD's layout: every step, the report, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from demo.config import DemoConfig
from demo.rsicd_plan import rsicd_plan
from priorclip.common import cpu_features
from priorclip.data_shards.synthetic import draw_scene

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 128, "val": 16, "test": 24}


def write_benchmark(folder: Path) -> None:
    """Writes images/ and dataset_rsicd_aid.json with drawn scenes and five captions each."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for split, count in COUNTS.items():
        for _ in range(count):
            scene = draw_scene(seed=5, index=len(entries), size=64)
            name = f"{scene.label.replace(' ', '')}_{len(entries)}.jpg"  # the scene is in the name, as in AID
            Image.fromarray(scene.image).save(folder / "images" / name)
            sentences = [{"raw": caption} for caption in scene.fine[:5]]
            entries.append({"filename": name, "scene": scene.label, "split": split, "sentences": sentences})
    (folder / "dataset_rsicd_aid.json").write_text(json.dumps({"dataset": "rsicd", "images": entries}))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("rsicd")
    write_benchmark(folder / "data")
    words = ["--source", "rsicd", "--data", str(folder / "data"), "--dir", str(folder / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "demo", *words], cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run", done.stdout


def test_report_and_export_are_of_the_test_images(benchmark: tuple[Path, str]) -> None:
    folder, said = benchmark
    report = json.loads((folder / "report.json").read_text())
    recall = json.loads((folder / "recall.json").read_text())
    assert (report["images"], report["captions"]) == (COUNTS["test"], 5 * COUNTS["test"])
    assert report["test"]["mean_recall"] == recall["mean_recall"]
    low, high = report["intervals"]["mean_recall"]
    assert low <= report["test"]["mean_recall"] <= high
    assert f"mean recall {recall['mean_recall']:.2f}" in said
    for name in ("export/model.safetensors", "export/tokenizer.json", "logs/tuned.log"):
        assert (folder / name).is_file(), name


def test_no_step_before_the_last_sees_the_test_images(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    steps = rsicd_plan(DemoConfig(source="rsicd", data=str(tmp_path)), tmp_path / "run")
    test = str(tmp_path / "run" / "shards" / "test")
    assert [step.name for step in steps if test in step.arguments] == ["pack-test", "recall"]
    trained = [step for step in steps if step.module == "finetune"]
    for step in trained:
        words = dict(zip(step.arguments[1::2], step.arguments[2::2], strict=True))
        assert words["--data.shards"].endswith("shards/train")
        assert words["--evaluation.shards"].endswith("shards/val")


@pytest.mark.parametrize(("flags", "precision"), [(["avx2", "avx512_bf16"], "bf16"), (["avx2"], "fp32")])
def test_the_model_trains_in_bfloat16_only_where_the_cpu_has_it(
    flags: list[str], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_benchmark(tmp_path)
    monkeypatch.setattr(cpu_features, "get_cpu_info", lambda: {"flags": flags})
    cpu_features.has_bfloat16.cache_clear()
    steps = rsicd_plan(DemoConfig(source="rsicd", data=str(tmp_path)), tmp_path / "run")
    cpu_features.has_bfloat16.cache_clear()
    [words] = [step.arguments for step in steps if step.name == "tuned"]
    assert words[words.index("--run.engine.precision") + 1] == precision


def test_a_folder_without_the_annotations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"has no dataset_rsicd_aid\.json"):
        rsicd_plan(DemoConfig(source="rsicd", data=str(tmp_path)), tmp_path / "run")
    with pytest.raises(ValueError, match="make rsicd DATA=FOLDER"):
        rsicd_plan(DemoConfig(source="rsicd"), tmp_path / "run")
