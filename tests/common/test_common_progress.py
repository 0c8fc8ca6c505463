"""Progress in a log and on a terminal, by real processes; who counts, and that every long command does."""

from __future__ import annotations

import ast
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from house import ALLOWED, ROOT, files_of
from real_trainings import environment

from priorclip.common import progress
from priorclip.common.progress import Progress, clock_time, counted, progress_line

TITLE = "pack \x1b[31m https://me:hunter2@host/a.tar\nERROR forged"
PROGRAM = f"""
import sys, time
from priorclip.common.output import set_up_logging
from priorclip.common.progress import Progress
set_up_logging("%(levelname)s %(message)s")
with Progress(2000, {TITLE!r}, "img", done=1000, every=float(sys.argv[1])) as shown:
    for _ in range(10):
        time.sleep(0.05)
        shown.update(100)
        shown.show({{"loss": 0.25}})
"""


def run(every: float, stderr: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(every)]
    return subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=stderr, timeout=120)


def test_a_log_gets_lines_with_share_rate_and_time_left() -> None:
    done = run(0.1, subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"")
    text = done.stderr.decode()
    assert not {"\r", "\x1b"} & set(text)
    assert "hunter2" not in text
    *lines, last = text.splitlines()
    name = r"INFO pack \\x1b\[31m https://\*\*\*@host/a\.tar ERROR forged: "
    form = name + r"(1,\d00|2,000) of 2,000 \(([\d.]+) %\), [\d,.]+ img/s, 0:00:0\d left; loss 0\.25"
    found = [re.fullmatch(form, line) for line in lines]
    assert len(found) >= 2
    assert all(found), lines
    counts = [int(each[1].replace(",", "")) for each in found if each]
    assert counts == sorted(counts)
    assert [float(each[2]) for each in found if each] == [count / 20 for count in counts]
    assert re.fullmatch(name + r"2,000 of 2,000 in 0:00:0\d", last)


def test_short_work_leaves_no_line() -> None:
    done = run(60, subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_terminal_gets_the_bar_and_no_line() -> None:
    terminal, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 120))
    done = run(0.1, other)
    os.close(other)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert (done.returncode, done.stdout) == (0, b"")
    assert "INFO" not in shown
    assert "\r" in shown
    assert "2000/2000" in shown
    assert "loss=0.25" in shown
    assert "hunter2" not in shown
    assert "\x1b[31m" not in shown


@pytest.mark.parametrize(
    ("done", "total", "rate", "line"),
    [
        (1200, 9700, 100.0, "1,200 of 9,700 (12.4 %), 100.0 img/s, 0:01:25 left"),
        (3, 4, 0.02, "3 of 4 (75.0 %), 50.0 s/img, 0:00:50 left"),
        (3, 4, 0.0, "3 of 4 (75.0 %), time left unknown"),
        (5, 4, 2.0, "5 of 4 (125.0 %), 2.0 img/s, 0:00:00 left"),
        (0, 0, 0.0, "0 of 0, time left unknown"),
    ],
)
def test_the_line_has_the_right_figures(done: int, total: int, rate: float, line: str) -> None:
    assert progress_line(done, total, "img", rate) == line


def test_the_rate_is_that_of_the_last_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Ten lines at 100 a second, and then ten at 1: the first ones no longer count."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = []
    with caplog.at_level("INFO"), Progress(20_000, "pack", "img", every=3600, shown=False) as counter:
        for number in range(20):
            now += 10
            counter.update(1000 if number < 10 else 10)
            counter._write_line()
            lines.append(caplog.messages[-1])
    assert lines[0] == "pack: 1,000 of 20,000 (5.0 %), 100.0 img/s, 0:03:10 left"
    assert lines[10] == "pack: 10,010 of 20,000 (50.0 %), 90.1 img/s, 0:01:51 left"
    assert lines[19] == "pack: 10,100 of 20,000 (50.5 %), 1.0 img/s, 2:45:00 left"


def test_clock_time() -> None:
    shown = {0.4: "0:00:00", 59.6: "0:01:00", 3725: "1:02:05", 108_000: "30:00:00"}
    assert {seconds: clock_time(seconds) for seconds in shown} == shown


def test_counted_yields_all_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[Progress] = []
    monkeypatch.setattr(Progress, "close", lambda self: last.append(self))
    assert list(counted("abc", "letters", "letter")) == ["a", "b", "c"]
    assert list(counted(iter("ab"), "letters", "letter", 2)) == ["a", "b"]
    assert [(each.done, each.total) for each in last] == [(3, 3), (2, 2)]


def test_other_ranks_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(2, "images", "image", shown=False, every=0.001) as shown:
        shown.closed.wait(0.05)
        shown.update(2)
    assert not caplog.records


def test_nobody_else_makes_a_bar() -> None:
    """A bar of its own would be silent in a log."""
    own = Path(progress.__file__).resolve()
    for path in (path for package in ALLOWED for path in files_of(package) if path.resolve() != own):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "tqdm" not in [name.split(".")[0] for name in names], path
