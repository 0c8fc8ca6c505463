"""Processes of a fork server see the environment of their own start, not that of the server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from priorclip.common.processes import pool
from priorclip.data_shards.pack.index_tars import parallel
from priorclip.data_shards.pack.worker_pool import WorkerPool
from priorclip.data_shards.stream.workers import load_batches, start_data_forkserver

NAMES = ("AWS_ENDPOINT_URL", "HF_TOKEN", "https_proxy", "GONE")


def seen(*_: object) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in NAMES}


class Seen:
    """A dataset whose items are the environment of the decoding worker."""

    def __getitems__(self, positions: list) -> dict[str, str | None]:
        return seen()

    def __len__(self) -> int:
        return 2


def test_every_process_sees_the_environment_of_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GONE", "when they start")
    start_data_forkserver()
    with pool(1) as early:
        early.submit(seen).result()  # now the fork server runs
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("https_proxy", "http://proxy:3128")
        monkeypatch.delenv("GONE")
        now = seen()
        assert now["GONE"] is None
        assert now["HF_TOKEN"] == "secret"
        assert list(WorkerPool(2).run(seen, [(0,), (1,)], 2)) == [now, now]
        assert parallel(seen, [0, 1], 2, "test") == [now, now]
        assert list(load_batches(Seen(), [[0], [1]], 1)) == [now, now]  # type: ignore[arg-type]
        assert early.submit(seen).result()["GONE"] == "when they start"
