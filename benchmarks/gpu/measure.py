"""The process of a section: measures its cases one after another and reports each. Imports torch when it starts.

    measure_cases("zero", [{"preset": "priorclip-tiny", "zero": "2"}], settings, connection, Path("zero.log"))

A report is ``{"row": figures}``, or ``{"failed": True, "reason": "out of memory: ..."}``, after which the process ends.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from priorclip.common.output import set_up_logging
from priorclip.common.printable import one_line
from priorclip.common.processes import end_with_asker

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate", "Unable to allocate")
# Section -> the function that measures one case: (case, settings) -> figures.
MEASURES = {
    "machine": "benchmarks.gpu.machine:measure_machine",
    "models": "benchmarks.gpu.models:measure_model",
    "kernels": "benchmarks.gpu.kernels:measure_kernels",
    "zero": "benchmarks.gpu.engine_steps:measure_stage",
    "grad_cache": "benchmarks.gpu.engine_steps:measure_cached",
    "losses": "benchmarks.gpu.losses:measure_losses",
    "loader": "benchmarks.gpu.loader:measure_loader",
}


def measure_cases(section: str, cases: list[dict[str, Any]], settings: dict[str, Any], reports: Any, log: Path) -> None:
    """Measures the cases in order, up to the first that fails. Everything that is printed goes to ``log``."""
    end_with_asker()
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    set_up_logging("%(levelname)s %(message)s", force=True)
    for case in cases:
        begun = time.monotonic()
        try:
            row = measure_of(section)(case, settings)
            report: dict[str, Any] = {"row": row | {"took_seconds": round(time.monotonic() - begun, 1)}}
        except Exception as error:
            traceback.print_exc()
            report = {"failed": True, "reason": reason_of(error)}
        reports.send(report)
        if report.get("failed"):
            return


def measure_of(section: str) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    module, _, name = MEASURES[section].partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def reason_of(error: BaseException) -> str:
    """Returns one line: ``out of memory: ...``, or the message of the error with its type."""
    text = one_line(str(error).strip().partition("\n")[0]) or "no message"
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return f"out of memory: {text}"
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
