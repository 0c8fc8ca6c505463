"""Decoding workers: they start beside a process group, survive SLURM's signals and end with the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from stream_data import config, stream_of, take

from priorclip.common.ports import free_port
from priorclip.data_shards import ShardSet, eval_batches
from priorclip.data_shards.stream import workers

ROOT = Path(__file__).parents[2]


RANK = """
    import sys, torch
    import torch.distributed as dist
    from priorclip.data_shards import ShardSet, ShardStream
    from priorclip.data_shards.config import DataConfig

    def main():
        rank, folder, port, method = int(sys.argv[1]), *sys.argv[2:]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        dist.all_reduce(torch.ones(100_000))
        config = DataConfig(folder, image_size=24, workers=1, start_method=method)
        stream = ShardStream(ShardSet(folder), None, config, global_batch=4, rank=rank, world_size=2, epochs=2)
        seen = torch.zeros(46, dtype=torch.int64)
        for batch in stream:
            seen[batch["image_ids"]] += 1
            dist.all_reduce(torch.ones(100_000))
        dist.all_reduce(seen)
        print("seen", seen.sum().item(), seen.max().item())
        dist.destroy_process_group()

    if __name__ == "__main__":
        main()
"""


def script(tmp_path: Path, text: str) -> tuple[Path, dict[str, str]]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return path, {**os.environ, "PYTHONPATH": str(ROOT)}


def test_workers_start_beside_a_process_group(packed: Path, tmp_path: Path) -> None:
    path, environment = script(tmp_path, RANK)
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(packed), port, method],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, method in enumerate(("forkserver", "fork"))
    ]
    for process in ranks:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "seen 88 2" in output  # 2 epochs of 11 batches of 4


def alive(group: int) -> list[str]:
    """Returns the command lines of the processes of a group that are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(owner) == group and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


PREEMPTED = """
    import os, signal, sys, threading, time
    sys.path.insert(0, sys.argv[4])  # not PYTHONPATH: the fork server must still find the package
    from priorclip.data_shards import ShardSet, ShardStream
    from priorclip.data_shards.config import DataConfig

    warned = []

    def main():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: warned.append(number))
        folder, method = sys.argv[1:3]
        config = DataConfig(folder, image_size=24, workers=2, start_method=method)
        stream = ShardStream(ShardSet(folder), None, config, global_batch=4)
        batches = iter(stream)
        threading.Timer(0.5, os.killpg, (0, signal.SIGUSR1)).start()  # at this time the fork server imports torch
        next(batches)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.killpg(0, number)
            time.sleep(0.3)
            for _ in range(30):
                next(batches)
        print("warned", len(warned), flush=True)
        if sys.argv[3] == "raise":
            raise RuntimeError("the iterator is still alive")

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(("method", "end"), [("forkserver", "return"), ("fork", "raise")])
def test_workers_outlive_the_warning_of_a_preemption(packed: Path, tmp_path: Path, method: str, end: str) -> None:
    """SLURM signals the whole process group, and the run must still finish its step and exit."""
    path, environment = script(tmp_path, PREEMPTED)
    process = subprocess.Popen(
        [sys.executable, str(path), str(packed), method, end, str(ROOT)],
        cwd=tmp_path,
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "warned 3" in output, errors
    assert process.returncode == (1 if end == "raise" else 0), errors
    ended = time.monotonic()
    while left := alive(process.pid):
        assert time.monotonic() - ended < 60, f"still running: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(packed: Path, workers: int) -> None:
    """Dropout must not depend on the number of streams or evaluations that were started."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    take(stream_of(config(packed, workers=workers)), 2)
    list(eval_batches(ShardSet(str(packed)), None, 8, 23, workers=workers).images())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("asked", "gpu", "pinned"), [(None, True, True), (None, False, False), (True, False, True), (False, True, False)]
)
def test_batches_are_pinned_if_there_is_a_gpu(
    asked: bool | None, gpu: bool, pinned: bool, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    class Loader(workers.DataLoader):
        def __init__(self, *args: object, pin_memory: bool, **options: object) -> None:
            found.append(pin_memory)
            super().__init__(*args, **options)  # pinning itself needs a GPU

    monkeypatch.setattr(workers, "DataLoader", Loader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    options = {} if asked is None else {"pin_memory": asked}
    assert len(take(stream_of(config(packed, **options)), 2)) == 2
    assert found == [pinned]
