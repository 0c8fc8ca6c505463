"""Ranks that never come, and errors of a full disk: a message after seconds that names what is missing, and where."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from toy_launches import PYTHON, ROOT, environment, root_needed

from priorclip.common.files import naming, write_text
from priorclip.common.ports import free_port
from priorclip.training.ranks import missing_ranks
from priorclip.training.ranks.missing_ranks import RollCall, origin_hint

START = """
from priorclip.common.command_line import run_command
from priorclip.training.config import EngineConfig
from priorclip.training.ranks import missing_ranks
from priorclip.training.ranks.distributed import start
missing_ranks.QUIET_SECONDS, missing_ranks.FIRST_SECONDS = 0.5, 3.0
raise SystemExit(run_command("toy", lambda: print("joined", start(EngineConfig(timeout_minutes=0.2, threads=1)).rank)))
"""


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUIET_SECONDS", "FIRST_SECONDS", "LATER_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(missing_ranks, name, 0.05)


@pytest.mark.usefixtures("at_once")
def test_rank_0_names_those_that_did_not_come(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 2 comes before the server of rank 0 is there, and rank 3 late."""
    port = free_port()
    rolls = [RollCall(rank, 4, "127.0.0.1", port, hint=". A hint") for rank in (2, 0)]
    wait_for(lambda: "rank 0 did not come" in rolls[0].problem)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    wait_for(lambda: f"rank 0 of 4 waits at 127.0.0.1:{port}: rank 1, 3 did not come in" in rolls[1].problem)
    rolls.append(RollCall(3, 4, "127.0.0.1", port, hint=""))
    wait_for(lambda: ": rank 1 did not come in" in rolls[1].problem)
    store.set("came/1", "1")
    wait_for(lambda: rolls[1].problem == rolls[0].problem == "")
    for roll in rolls:
        roll.end()
        assert not roll.thread.is_alive()
    warnings = [record.message for record in caplog.records if ": rank 1, 3 did not come" in record.message]
    assert warnings[0].endswith(" s. A hint")


def test_start_that_is_quick_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    roll = RollCall(0, 4, "127.0.0.1", free_port(), hint="")
    roll.end()
    assert (roll.problem, roll.thread.is_alive(), caplog.records) == ("", False, [])


def test_shell_of_srun_is_told_what_to_unset() -> None:
    """`srun -n 3 --pty bash` sets SLURM's variables of three tasks, and one process is there."""
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    slurm = {**dict.fromkeys(names, "0"), "SLURM_STEP_NUM_TASKS": "3", "SLURM_JOB_ID": "77",
             "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_STEP_NODELIST": "localhost"}  # fmt: skip
    variables = {**environment(), **slurm, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [PYTHON, "-c", START], cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=300,
    )  # fmt: skip
    assert "rank 0 of 3 waits at 127.0.0.1:" in done.stdout
    assert "rank 1, 2 did not come" in done.stdout
    assert "SLURM_STEP_NUM_TASKS is 3: in an interactive shell of srun (--pty), unset it" in done.stdout
    assert "Traceback" not in done.stdout
    assert done.returncode == 2


def test_hint_is_about_the_variable_that_counts() -> None:
    both = {"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "2"}
    assert "WORLD_SIZE is 2" in origin_hint(both, ranks_are_set=True)
    assert "SLURM_STEP_NUM_TASKS is 4" in origin_hint(both, ranks_are_set=False)
    assert origin_hint({}, ranks_are_set=False) == ""


def test_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """The system gives no name when a write fails, only when an open fails."""
    root_needed("to mount a file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/report.json'"):
            write_text(tmp_path / "report.json", "x" * 9000)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_error_of_something_else_gets_no_name() -> None:
    for number in (errno.ECONNRESET, errno.ENOENT):
        with pytest.raises(OSError) as caught, naming("a.json"):
            raise OSError(number, os.strerror(number))
        assert caught.value.filename is None
    with pytest.raises(OSError, match=r"'b\.json'"), naming("a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "b.json")


WORKERS = """
from priorclip.common.command_line import run_command
import torch
from priorclip.data_shards.stream.workers import load_batches

class Fetcher:
    def __getitems__(self, entry):
        return {"n": torch.zeros(1 << 20, dtype=torch.uint8)}

if __name__ == "__main__":
    raise SystemExit(run_command("toy", lambda: print(len(list(load_batches(Fetcher(), [[1], [2]], 1))))))
"""


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_full_shared_memory_is_named(tmp_path: Path, size: str) -> None:
    """With 4 KB there is no room for a semaphore, with 64 KB none for a batch."""
    root_needed("to mount a file system")
    program = tmp_path / "program.py"
    program.write_text(WORKERS)
    fill = "head -c 4096 /dev/zero > /dev/shm/filler; " if size == "4k" else ""
    shell = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && {fill}exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", shell, "_", sys.executable, str(program)],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("toy: error: ")]
    assert line.startswith("toy: error: [Errno 28] ")
    assert line.endswith("'/dev/shm'")
