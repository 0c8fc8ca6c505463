"""The log lines of a run, and its ``report.json``."""

from __future__ import annotations

import json
import logging
import socket
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from priorclip.common.files import write_text
from priorclip.common.masking import masked_command, masked_values
from priorclip.common.output import get_logger, quiet
from priorclip.common.output import set_up_logging as set_up_output
from priorclip.common.progress import print_above
from priorclip.training.ranks.distributed import Rank

logger = get_logger(__name__)


class ProgressBarHandler(logging.Handler):
    """Writes log lines to standard output, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print_above(self.format(record), sys.stdout)


def set_up_logging(rank: Rank) -> None:
    """Puts the rank before each message. Ranks other than 0 log only warnings and errors."""
    level = logging.INFO if rank.is_first else logging.WARNING
    form = f"%(asctime)s rank {rank.rank}: %(message)s"
    set_up_output(form, level, ProgressBarHandler(), datefmt="%H:%M:%S", force=True)
    sys.excepthook = lambda kind, error, trace: log_failure(rank, kind, error, trace)
    # DeepSpeed uses names of torch.distributed that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    quiet("DeepSpeed", "httpx", "timm", "transformers")


def log_failure(rank: Rank, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Logs an exception that ends this rank, with rank and host, because many ranks write to one log."""
    where = f"rank {rank.rank} of {rank.world_size} on {socket.gethostname()}"
    logger.error("%s fails: %s: %s", where, kind.__name__, error, exc_info=(kind, error, trace))


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes ``report.json`` of the run directory, complete or not at all."""
    report = {**masked_values(report), "command": masked_command(sys.argv)}
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    logger.info("finished: %s", folder / "report.json")
