"""A server that falls silent costs a batch a few timeouts, not one for each replaced sample."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from remote_data import TAR, open_shards
from remote_server import Behaviour, RemoteServer

from priorclip.data_shards import ShardStream, eval_batches
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.remote import http_ranges
from priorclip.data_shards.remote.http_ranges import RemoteError, fetch_version
from priorclip.data_shards.remote.time_budget import TIMEOUTS, SilentServer, TimeBudget

pytestmark = pytest.mark.usefixtures("quick_retries")
TIMEOUT = 0.5
MOST = (TIMEOUTS + http_ranges.SILENT + 2) * TIMEOUT + 2  # the budget, the reads that cross it, and this machine


@pytest.mark.parametrize("read_ahead", [0, 16])
@pytest.mark.parametrize("only", [r"\.tar$", r"\.(tar|idx)$"])
def test_a_batch_from_a_silent_server_ends_within_its_budget(
    server: RemoteServer, tmp_path: Path, read_ahead: int, only: str
) -> None:
    """100 replacements of 0.5 s each would take 50 s."""
    shards = open_shards(f"{server.url}/train/", tmp_path, timeout=TIMEOUT, cache_limit=0, read_ahead=read_ahead)
    config = DataConfig("", image_size=24, workers=0, block_size=4, window_blocks=3, max_bad_share=1.0)
    batches = iter(ShardStream(shards, None, config, global_batch=8, seed=5))
    server.behaviour = Behaviour(latency=3 * TIMEOUT, only=only)
    started = time.monotonic()
    with pytest.raises(SilentServer, match=r"data\.timeout.*remote cannot be read.*timeout"):
        next(batches)
    assert time.monotonic() - started < MOST


def test_an_evaluation_on_a_silent_server_ends_within_its_budget(server: RemoteServer, tmp_path: Path) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path, timeout=TIMEOUT, cache_limit=0)
    batches = eval_batches(shards, None, 24, 16, skip_bad=True).images()
    server.behaviour = Behaviour(latency=3 * TIMEOUT)
    started = time.monotonic()
    with pytest.raises(SilentServer):
        next(iter(batches))
    assert time.monotonic() - started < MOST


def test_a_silent_server_gets_few_attempts_and_a_busy_one_all(server: RemoteServer) -> None:
    url = f"{server.url}/train/{TAR}"
    server.behaviour = Behaviour(latency=1.0)
    with pytest.raises(RemoteError, match="3 attempts"):
        fetch_version(url, 0.2)
    http_ranges._process.down.clear()
    server.behaviour = Behaviour(statuses=[(503, {})] * 9)
    with pytest.raises(RemoteError, match="6 attempts"):
        fetch_version(url, 5)


def fail(budget: TimeBudget, seconds: float) -> None:
    with budget.counting():
        time.sleep(seconds)
        raise OSError("no answer")


def test_only_failed_reads_of_one_batch_count() -> None:
    budget = TimeBudget(0.025)  # a budget of 0.1 s
    for _ in range(4):
        budget.begin_batch()
        with budget.counting():
            time.sleep(0.2)
        with pytest.raises(OSError, match="no answer"):
            fail(budget, 0.06)
    with pytest.raises(SilentServer, match="no answer"):
        fail(budget, 0.06)


def test_without_batches_a_read_that_succeeds_starts_a_new_budget() -> None:
    budget = TimeBudget(0.025)
    for _ in range(4):
        with pytest.raises(OSError, match="no answer"):
            fail(budget, 0.06)
        with budget.counting():
            pass
    assert not budget.is_spent
