"""Runs the cases of a section in a process of its own, within the time, whatever happens to the process.

    for outcome in run_cases(processes_for("cuda", budget), "zero", cases, settings, budget, Path("runs/gpu")):
        outcome.case, outcome.row or outcome.reason

The process reports each case as it is done. A case that fails ends it, because what a failure leaves in the memory of a
GPU cannot be trusted: the other cases go on in a new process. A process that is killed fails its current case only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu.cases import Case
from benchmarks.gpu.measure import measure_cases

# Imported once, in the server that CPU processes are forked from.
PRELOADED = ["benchmarks.gpu.measure", "torch", "deepspeed", "priorclip.model", "timm", "transformers", "open_clip"]


@dataclass(frozen=True)
class Outcome:
    """A case with its figures, or with the reason why it has none; ``failed`` is false if only the time was over."""

    case: Case
    row: dict[str, Any] | None = None
    reason: str = ""
    failed: bool = False


class Budget:
    """The time of the whole benchmark; ``minutes`` None has no end."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float | None:
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.seconds_left == 0

    def __str__(self) -> str:
        return f"the {self.minutes:g} minutes were over (--minutes)"


def kind_of_device(device: str) -> str:
    """Returns cuda or cpu. Asks another process, so that this one never holds memory of a GPU.

    Raises ValueError if a GPU is asked for and torch sees none.
    """
    if device == "cpu":
        return device
    code = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    there = done.stdout.strip() == "True"
    if device == "cuda" and not there:
        raise ValueError("--device cuda: torch sees no GPU on this machine, use --device cpu")
    return "cuda" if there else "cpu"


def processes_for(kind: str, budget: Budget) -> Any:
    """Returns the context of multiprocessing: a GPU needs processes that share nothing with others."""
    if kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    context = multiprocessing.get_context("spawn" if kind == "cuda" else "forkserver")
    if kind == "cpu" and not budget.is_over:
        context.set_forkserver_preload(PRELOADED)
    return context


def run_cases(
    processes: Any, section: str, cases: list[Case], settings: dict[str, Any], budget: Budget, folder: Path
) -> Iterator[Outcome]:
    """Yields the outcome of each case in order; ``folder`` gets the log of the processes."""
    rest = list(cases)
    while rest and not budget.is_over:
        for outcome in run_process(processes, section, list(rest), settings, budget, folder / f"{section}.log"):
            rest.remove(outcome.case)
            yield outcome
    for case in rest:
        yield Outcome(case, reason=f"not reached: {budget}")


def run_process(
    processes: Any, section: str, cases: list[Case], settings: dict[str, Any], budget: Budget, log: Path
) -> Iterator[Outcome]:
    """Yields the outcomes of one process, at least one unless the time is over."""
    reports, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=measure_cases, args=(section, cases, settings, sender, log), daemon=False)
    process.start()
    sender.close()
    current = cases[0]
    yielded = 0
    try:
        while True:
            if budget.is_over:
                yield Outcome(current, reason=f"not finished: {budget}")
                return
            try:
                report = next_report(reports, process, budget)
            except EOFError:
                process.join()
                reason = f"its process ended: {how_it_ended(process.exitcode, log)}"
                yield Outcome(current, reason=reason, failed=True)
                return
            if report is None:
                continue
            yielded += 1
            yield Outcome(cases[yielded - 1], **report)
            if yielded == len(cases) or report.get("failed"):
                process.join(timeout=10)
                return
            current = cases[yielded]
    finally:
        end_tree(process.pid)
        process.join()
        reports.close()


def next_report(reports: Connection, process: Any, budget: Budget) -> dict[str, Any] | None:
    """Waits for a report; None if the time is over before. Raises EOFError if the process has ended without one."""
    ready = wait([reports, process.sentinel], timeout=budget.seconds_left)
    if reports in ready or reports.poll():
        return reports.recv()  # type: ignore[no-any-return]
    if ready:
        raise EOFError
    return None


def how_it_ended(code: int | None, log: Path) -> str:
    """``killed by SIGKILL`` or ``exit code 1``, and the last line of its log."""
    ended = f"exit code {code}"
    if code is not None and code < 0:
        ended = f"killed by {signal.Signals(-code).name}"
        ended += " (the memory of the machine may be out)" if -code == signal.SIGKILL else ""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return f"{ended}: {lines[-1]}" if lines else ended


def end_tree(pid: int) -> None:
    """Kills the process and those that it has started."""
    try:
        whole = psutil.Process(pid)
        family = [*whole.children(recursive=True), whole]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
