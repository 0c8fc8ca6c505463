"""What a run leaves for people and scripts: log lines from rank 0, and ``report.json``."""

from __future__ import annotations

import json
import logging
import socket
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from priorclip.common.files import write_text
from priorclip.common.masking import MaskedFormatter, masked_command, masked_values
from priorclip.training.ranks.distributed import Rank

logger = logging.getLogger(__name__)


class AboveTheBar(logging.Handler):
    """Log lines on standard output, on a line of their own while a progress bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def set_up_logging(rank: Rank) -> None:
    """Messages with the rank in front; only warnings from all ranks but the first."""
    level = logging.INFO if rank.is_first else logging.WARNING
    form = f"%(asctime)s rank {rank.rank}: %(message)s"
    handler = AboveTheBar()
    handler.setFormatter(MaskedFormatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    sys.excepthook = lambda kind, error, trace: log_failure(rank, kind, error, trace)
    # DeepSpeed calls torch.distributed by names that torch has since renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for noisy in ("DeepSpeed", "httpx", "timm", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_failure(rank: Rank, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception that ends the rank, with its place: many ranks write into one log."""
    where = f"rank {rank.rank} of {rank.world_size} on {socket.gethostname()}"
    logger.error("%s fails: %s: %s", where, kind.__name__, error, exc_info=(kind, error, trace))


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """``report.json`` of the run directory, whole or not at all."""
    report = {**masked_values(report), "command": masked_command(sys.argv)}
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    logger.info("finished: %s", folder / "report.json")
