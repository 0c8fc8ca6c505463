"""Worker processes end with the process that asked for them, whatever ends it, and however busy they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "PRIORCLIP_TEST_ORPHANS"
END_SECONDS = 30.0

LOADER = """
import time
from priorclip.data_shards.stream.workers import load_batches

class Fetcher:
    def __getitems__(self, entry):
        if entry[0] >= BUSY_FROM:
            time.sleep(600)
        return {"n": entry[0]}

if __name__ == "__main__":
    batches = load_batches(Fetcher(), ([n] for n in range(10**9)), 2, start_method="METHOD")
    for _ in range(3):
        next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""
POOL = """
import time
from priorclip.common.processes import pool

if __name__ == "__main__":
    with pool(2) as workers:
        for _ in workers.map(abs, range(4)):
            pass
        busy = [workers.submit(time.sleep, 600) for _ in range(BUSY_JOBS)]
        print("ready", flush=True)
        time.sleep(600)
"""
PROGRAMS = {
    "loader": LOADER.replace("BUSY_FROM", "10**9").replace("METHOD", "forkserver"),
    "busy loader": LOADER.replace("BUSY_FROM", "3").replace("METHOD", "forkserver"),
    "forked loader": LOADER.replace("BUSY_FROM", "3").replace("METHOD", "fork"),
    "pool": POOL.replace("BUSY_JOBS", "0"),
    "busy pool": POOL.replace("BUSY_JOBS", "4"),
}


def family(mark: str) -> list[psutil.Process]:
    """Processes that were started with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("name", "frozen"),
    [*((name, False) for name in PROGRAMS), *((name, True) for name in ("busy loader", "pool"))],
)
def test_killed_process_leaves_no_worker(tmp_path: Path, name: str, frozen: bool) -> None:
    """Nor a fork server, nor a resource tracker. A ``frozen`` worker was stopped, so that it cannot end by itself."""
    program, mark = tmp_path / "program.py", uuid.uuid4().hex
    program.write_text(PROGRAMS[name])
    environment = {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)}
    asker = subprocess.Popen([sys.executable, program], env=environment, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert asker.stdout
        assert asker.stdout.readline() == b"ready\n"
        assert len(family(mark)) >= 3
        if frozen:
            (server,) = [each for each in psutil.Process(asker.pid).children() if "forkserver" in each.cmdline()[-1]]
            for worker in server.children():
                worker.suspend()
        asker.send_signal(signal.SIGKILL)
        asker.wait()
        deadline = time.monotonic() + END_SECONDS
        while (left := family(mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert [process.cmdline() for process in left] == []
    finally:
        asker.kill()
        for process in family(mark):
            process.kill()
