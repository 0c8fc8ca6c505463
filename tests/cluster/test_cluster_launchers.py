"""One process compared with two ranks, and a rank that fails under mpirun. Other launchers: test_cluster_page.py."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from toy_launches import PYTHON, ToyRun, execute, needed, run_toys, toy_arguments


@pytest.fixture(scope="module")
def single(toys: dict[str, ToyRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """Runs of one process without a launcher."""
    parent = tmp_path_factory.mktemp("single")
    return run_toys(parent, {"plain": ("--run.engine.zero", "2")}, launcher=(PYTHON, "-m", "tests.toy_runs"))


def test_one_process_has_the_trace_of_two_ranks(toys: dict[str, ToyRun], single: dict[str, ToyRun]) -> None:
    assert single["plain"].losses() == pytest.approx(toys["zero2"].losses(), rel=1e-6)
    assert single["plain"].records("eval/mse") == pytest.approx(toys["zero2"].records("eval/mse"), rel=1e-6)


def mpirun() -> tuple[str, ...]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return (needed("mpirun", "openmpi-bin"), *root, "--oversubscribe", "--bind-to", "none", "-n", "2", PYTHON, "-m")


def test_rank_that_fails_under_mpirun_ends_the_job(tmp_path: Path) -> None:
    begun = time.time()
    done = execute([*mpirun(), "tests.toy_run", *toy_arguments(tmp_path / "run", "--raise_at", "3")])
    records = ToyRun(tmp_path / "run").records("time")
    assert done.returncode == 1
    assert time.time() - max(begun, *records.values()) < 60
    assert f"rank 1 of 2 on {socket.gethostname()} fails: RuntimeError: asked to fail" in done.stdout
