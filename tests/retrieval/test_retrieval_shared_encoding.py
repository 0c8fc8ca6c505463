"""`evaluate` and `index` on several processes of torchrun write what one process writes, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_galleries import TestSet

from priorclip.data_shards import eval_batches
from priorclip.retrieval.gallery import open_gallery
from priorclip.retrieval.shared_encoding import from_all_ranks, of_first_rank

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(words: list[str], ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m retrieval``, on ``ranks`` processes of torchrun if that is not 0, with one thread each."""
    launch = [*TORCHRUN, str(ranks), "-m", "retrieval"] if ranks else [sys.executable, "-m", "retrieval"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def of(test_set: TestSet, *words: str) -> list[str]:
    data = ["--data", str(test_set.json), "--images", str(test_set.images)]
    return ["--model", str(test_set.export), *data, "--device", "cpu", "--batch_size", "5", *words]


def test_an_index_of_two_ranks_is_that_of_one(test_set: TestSet, tmp_path: Path) -> None:
    files = {}
    for ranks in (0, 2):
        output = tmp_path / f"index-{ranks}"
        done = run(["index", *of(test_set, "--output", str(output))], ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{output}: ") == 1, done.stdout
        files[ranks] = {path.name: path.read_bytes() for path in output.iterdir()}
    assert files[2] == files[0]
    assert len(files[2]["embeddings.safetensors"]) > 500


def test_figures_of_three_ranks_are_those_of_one(test_set: TestSet, tmp_path: Path) -> None:
    """Three tasks. Features and confusions are written once. One rank has no batch of images."""
    reports: dict[int, dict[str, Any]] = {}
    stored = {}
    for ranks in (0, 3):
        folder = tmp_path / str(ranks)
        words = ["--output", str(folder / "report.json"), "--features", str(folder / "features"), "--batch_size", "16"]
        words += ["--tasks", "retrieval,zeroshot,probe", "--confusions", str(folder / "confusions.png")]
        done = run(["evaluate", *of(test_set, *words)], ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == 1, done.stdout
        reports[ranks] = json.loads((folder / "report.json").read_text())
        reports[ranks].pop("seconds")
        reports[ranks].pop("confusions")
        stored[ranks] = {path.name: path.read_bytes() for path in (folder / "features").iterdir()}
        assert (folder / "confusions.png").stat().st_size > 1000
    assert reports[3] == reports[0]
    assert stored[3] == stored[0]
    assert stored[3]


def test_a_rank_that_fails_is_named_and_ends_the_others(test_set: TestSet, tmp_path: Path) -> None:
    done = run(["index", *of(test_set, "--output", str(tmp_path), "--model", str(tmp_path / "none"))], 2)
    assert done.returncode == 1  # torchrun's own
    assert "retrieval index: error: rank " in done.stderr
    assert " of 2 on " in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_command_of_one_process_is_refused(tmp_path: Path) -> None:
    done = run(["search", "--index", str(tmp_path), "--text", "a river"], 2)
    assert done.returncode == 1
    assert "search is one process, and torchrun has started 2 of it: only evaluate and index share work" in done.stderr


@pytest.mark.parametrize("size", [1, 4, 7, 64])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_whole_batches_are_those_of_one_process(test_set: TestSet, size: int, ranks: int) -> None:
    gallery = open_gallery(str(test_set.json), str(test_set.images))

    def plans(count: int, rank: int) -> list[list[int]]:
        batches = eval_batches(gallery.source, None, 32, size, rank, count, whole=True, skip_bad=True)
        return batches._plan(range(batches.image_count))

    alone, shared = plans(1, 0), [plans(ranks, rank) for rank in range(ranks)]
    padding = [-1] * size
    assert [batch for batch in alone if batch == padding] == []
    rounds = max(map(len, shared))
    joined = [plan[turn] for turn in range(rounds) for plan in shared if turn < len(plan)]
    assert [batch for batch in joined if batch != padding] == alone
    assert all(len(batch) == size for plan in shared for batch in plan)
    assert all(shared)


def test_a_process_alone_has_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    assert torch.equal(from_all_ranks(rows), rows)
    assert of_first_rank({"a": 1}) == {"a": 1}
