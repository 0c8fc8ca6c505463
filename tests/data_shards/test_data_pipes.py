"""``pipe:`` shards: commands that are slow, silent, broken, or leave something running."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from priorclip.data_shards.remote import pipe_shards
from priorclip.data_shards.remote.pipe_shards import fetch_pipe


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_shards, "FIRST_PAUSE", 0.01)


def test_a_slow_command_is_read_to_its_end_and_runs_once(tmp_path: Path) -> None:
    """It takes longer than the timeout, but it is never silent for so long."""
    url = f"pipe:echo x >> {tmp_path}/calls; for n in 1 2 3 4 5 6; do sleep 0.25; printf $n; done"
    for _ in range(2):
        assert fetch_pipe(url, str(tmp_path / "cache"), timeout=1.0).read_bytes() == b"123456"
    assert (tmp_path / "calls").read_text() == "x\n"


@pytest.mark.parametrize(
    "command",
    [
        "echo $$ > {pid}; printf begin; sleep 300",
        "sleep 300 & echo $! > {pid}; printf begin",  # the shell ends, its child holds the output open
        "exec >&-; echo $$ > {pid}; sleep 300",  # it closes its output and goes on
    ],
)
def test_a_silent_command_is_ended_with_all_that_it_started(command: str, tmp_path: Path) -> None:
    url = "pipe:" + command.format(pid=tmp_path / "pid")
    start = time.monotonic()
    with pytest.raises(OSError, match=r"was silent for 0\.3 seconds \(data\.timeout\); run the command by hand"):
        fetch_pipe(url, str(tmp_path / "cache"), timeout=0.3)
    assert time.monotonic() - start < 60
    left = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("command", "why"),
    [("printf half; exit 3", "exit code 3"), ("true", "printed nothing"), ("exit 141", "printed nothing")],
)
def test_a_failed_command_leaves_no_copy(command: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=why):
        fetch_pipe(f"pipe:{command}", str(tmp_path), timeout=5)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".tmp", ".lock"}
