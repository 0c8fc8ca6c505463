"""`experiments shift`: real evaluations of an export on other data, and the table of rows and seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from priorclip.data_shards import ShardSet, train_tokenizer
from priorclip.data_shards.__main__ import main as data_shards
from priorclip.data_shards.tokenizer import all_captions
from priorclip.experiments.__main__ import main
from priorclip.experiments.commands import ShiftConfig
from priorclip.experiments.shift import evaluated, find_exports, less_first, measure_shift, shift_table
from priorclip.model import build_model, load_preset, save_pretrained


def write_run(folder: Path, row: str, seed: int, recall: float) -> Path:
    """A finished run whose export is an empty file, and returns the export."""
    run = folder / row / f"seed-{seed}" / "closed"
    (run / "export").mkdir(parents=True)
    (run / "export" / "model.safetensors").write_bytes(b"")
    (run / "report.json").write_text(json.dumps({"test": {"mean_recall": recall}}))
    return run / "export"


def test_an_export_is_evaluated_on_other_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["pack", "--source", "synthetic", "--count", "48", "--size", "32", "--workers", "1"]
    assert data_shards([*words, "--output", str(tmp_path / "other")]) == 0
    torch.manual_seed(0)
    texts = all_captions(ShardSet(str(tmp_path / "other")), ["captions"])
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer", 300, 24)
    config = load_preset("priorclip-tiny")
    config.vision.image_size = config.prior.image_size = 64
    config.text.context_length = 24
    model = build_model(config, vocab_size=len(tokenizer))
    export = write_run(tmp_path / "sweep", "one-stage-soft", 0, 21.5)
    save_pretrained(model.state_dict(), model.config, export, tokenizer_folder=tmp_path / "tokenizer")
    other = json.dumps({"drawn": str(tmp_path / "other")})
    command = ["shift", str(tmp_path / "sweep"), "--retrieval", other, "--scenes", other]
    command += ["--options", '{"bootstrap": 0, "device": "cpu", "train_share": 0.5}']
    capsys.readouterr()  # what packing said
    assert main(command) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "sweep" / "shift"
    retrieval, scenes = (
        json.loads((folder / "one-stage-soft" / "seed-0" / f"drawn-{name}.json").read_text())
        for name in ("retrieval", "zeroshot-probe")
    )
    figures = [retrieval["mean_recall"], scenes["zeroshot"]["top1"], scenes["probe"]["top1"]]
    cells = " | ".join(f"{figure:.1f}" for figure in [21.5, *figures])
    assert f"| PriorCLIP, one stage | {cells} |" in said
    assert f"| chance |  | {retrieval['chance']['mean_recall']:.1f} |" in said
    assert said == (folder / "shift.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("drawn-*")}
    assert main(command) == 0  # nothing is evaluated again
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("drawn-*")} == stamps


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two rows with two seeds, whose evaluations are made up."""
    for row, home in (("one-stage-no-prior", 18.0), ("one-stage-soft", 20.0)):
        for seed in range(2):
            write_run(tmp_path / "sweep", row, seed, home + seed)

    def report(run: Any, name: str, config: ShiftConfig, folder: Path) -> dict[str, Any]:
        gain = 3 * (run.row == "one-stage-soft") + run.seed * (1 + 2 * (run.row == "one-stage-soft"))
        return {"mean_recall": 10.0 + gain, "chance": {"mean_recall": 2.5}, "zeroshot": {"top1": 40.0}}

    monkeypatch.setattr("priorclip.experiments.shift.evaluated", report)
    return tmp_path / "sweep"


def test_rows_are_compared_seed_by_seed(figures: Path) -> None:
    table = measure_shift(ShiftConfig(str(figures), retrieval={"ucm": "x"}))
    assert list(table["rows"]) == ["one-stage-no-prior", "one-stage-soft"]
    soft = table["rows"]["one-stage-soft"]
    assert soft["at home"]["runs"] == {"0": 20.0, "1": 21.0}
    assert soft["ucm: mean recall"]["mean"] == 14.5  # of 13 and 16
    less = table["less_first"]["one-stage-soft"]["ucm: mean recall"]
    assert (less["mean"], less["runs"]) == (4.0, {"0": 3.0, "1": 5.0})
    assert less["spread"] == pytest.approx(2**0.5)
    text = shift_table(table)
    assert "| PriorCLIP, one stage | 20.5 ± 0.7 | 14.5 ± 2.1 | 40.0 ± 0.0 |" in text
    assert "| PriorCLIP, one stage | +2.0 ± 0.0 | +4.0 ± 1.4 | +0.0 ± 0.0 |" in text
    assert json.loads((figures / "shift" / "shift.json").read_text()) == table


def test_only_seeds_of_both_rows_are_paired() -> None:
    rows = {"a": {"x": {0: 1.0, 1: 2.0}}, "b": {"x": {1: 5.0, 2: 9.0}, "y": {1: 1.0}}}
    found = less_first(rows)["b"]
    assert found["x"]["runs"] == {"1": 3.0}
    assert "y" not in found


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    export = write_run(tmp_path, "one-stage-soft", 3, 1.0)
    (tmp_path / "one-stage-soft" / "seed-3" / "prior" / "export").mkdir(parents=True)
    (tmp_path / "one-stage-soft" / "seed-3" / "prior" / "report.json").write_text("{}")
    (tmp_path / "one-stage-soft" / "seed-3" / "prior" / "export" / "model.safetensors").write_bytes(b"")
    write_run(tmp_path, "removed", 0, 1.0).joinpath("model.safetensors").unlink()
    assert [run.export for run in find_exports(tmp_path)] == [export]


def test_what_cannot_be_evaluated_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["shift", str(tmp_path), "--retrieval", "{ucm: x}"]) == 2
    assert "run the sweep with --keep export" in capsys.readouterr().err
    write_run(tmp_path / "sweep", "one-stage-soft", 0, 1.0)
    (run,) = find_exports(tmp_path / "sweep")
    config = ShiftConfig(str(tmp_path / "sweep"), retrieval={"ucm": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match=r"failed, see .*ucm-retrieval\.log: .*error"):
        evaluated(run, "ucm", config, tmp_path / "out")
    with pytest.raises(ValueError, match="letters, digits, - and _ only"):
        ShiftConfig("x", retrieval={"../ucm": "y"})
    with pytest.raises(ValueError, match="name other data by --retrieval"):
        ShiftConfig("x")
