"""Too many bad samples on one rank end the whole run: no rank waits in a collective for a rank that has ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from real_trainings import IMAGES, ROOT, SMALL, VIT, environment

from priorclip.data_shards import ShardSet, ShardStream, TooManyBadSamples
from priorclip.data_shards.config import DataConfig

BATCH, SEED = 8, 0
LIMIT_SECONDS, START_SECONDS = 60, 240
MESSAGE = "TooManyBadSamples: 1 bad samples in epoch 0, more than data.max_bad_share allows (0 on this rank)"


def stream(shards: Path, rank: int) -> ShardStream:
    config = DataConfig(str(shards), image_size=48, workers=0, max_bad_share=0)
    return ShardStream(ShardSet(str(shards)), None, config, global_batch=BATCH, rank=rank, world_size=2, seed=SEED)


def blank_image(shards: Path, rank: int) -> str:
    """Blanks an image that this rank reads in the third step of the first epoch. Returns the name of its shard."""
    source = ShardSet(str(shards))
    batches = iter(stream(shards, rank))
    sample = [int(next(batches)["image_ids"][0]) for _ in range(3)][-1]
    shard, image = Path(source.name(sample)[0]), source.read(sample).image
    content = shard.read_bytes()
    assert content.count(image) == 1
    shard.write_bytes(content.replace(image, bytes(len(image))))
    steps = [steps_taken(stream(shards, number)) for number in range(2)]
    assert steps[rank] == 2
    assert steps[1 - rank] == IMAGES // BATCH
    return shard.name


def steps_taken(source: ShardStream) -> int:
    """Counts the batches of an epoch before there are too many bad samples."""
    batches = iter(source)
    for step in range(len(source)):
        try:
            next(batches)
        except TooManyBadSamples:
            return step
    return len(source)


class Watched:
    """A process whose output is read line by line. Keeps the time at which MESSAGE came."""

    def __init__(self, command: Sequence[str], variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**environment(), **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.failed_at: float | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if MESSAGE in line and self.failed_at is None:
                self.failed_at = time.monotonic()
            self.lines.append(line)

    def finish(self) -> str:
        """Kills the remaining processes. Returns the whole output."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(LIMIT_SECONDS)  # ends when no process has the pipe open
        assert not self._reader.is_alive(), "a rank still runs after the run ended"
        return "".join(self.lines)


def wait_for(ranks: Sequence[Watched]) -> tuple[str, bool]:
    """Returns the output of the ranks, and whether all ended within LIMIT_SECONDS of the first failure."""
    started = time.monotonic()
    while any(each.process.poll() is None for each in ranks):
        failed = [each.failed_at for each in ranks if each.failed_at is not None]
        if time.monotonic() > (min(failed) + LIMIT_SECONDS if failed else started + START_SECONDS):
            return "".join(each.finish() for each in ranks), False
        time.sleep(0.2)
    return "".join(each.finish() for each in ranks), True


@pytest.mark.parametrize(("failing", "launched", "workers"), [(0, False, 1), (1, True, 0)])
def test_one_rank_with_too_many_bad_samples_ends_the_run(
    failing: int, launched: bool, workers: int, data: Path, tmp_path: Path
) -> None:
    """Without a launcher the healthy rank has to end by itself. A launcher returns the exit code of the run."""
    shards = Path(shutil.copytree(data / "train", tmp_path / "shards"))
    bad_shard = blank_image(shards, failing)
    words = ["pretrain", "--preset", "priorclip-tiny", *VIT, *SMALL, "--data.shards", shards, "--tokenizer",
             data / "tokenizer", "--run.dir", tmp_path / "run", "--run.engine.global_batch", BATCH, "--run.epochs", 2,
             "--run.seed", SEED, "--data.workers", workers, "--data.max_bad_share", 0, "--run.log_every", 1,
             "--model.text.context_length", 24, "--run.progress", "false"]  # fmt: skip
    ranks = start([str(word) for word in words], launched)
    output, ended = wait_for(ranks)
    assert ended, output
    assert MESSAGE in output
    assert all(each.process.returncode != 0 for each in ranks), output
    assert f"rank {failing} of 2 on " in output
    assert f"{bad_shard} (1). Reasons: " in output
    assert not (tmp_path / "run" / "report.json").exists()


def start(words: list[str], launched: bool) -> list[Watched]:
    """Starts two ranks: by ``cluster launch``, which is one process to watch, or each as its own process."""
    if launched:
        return [Watched([sys.executable, "-m", "cluster", "launch", "--nproc", "2", "--", *words], {})]
    from priorclip.common.ports import free_port

    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", *words]
    return [Watched(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
