"""What a run leaves for people and scripts: log lines from rank 0, and ``report.json``."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from cluster.checkpoint import replace_text
from cluster.distributed import Rank

logger = logging.getLogger(__name__)


def set_up_logging(rank: Rank) -> None:
    """Messages with the rank in front; only warnings from all ranks but the first."""
    level = logging.INFO if rank.is_first else logging.WARNING
    form = f"%(asctime)s rank {rank.rank}: %(message)s"
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", stream=sys.stdout, force=True)
    for noisy in ("DeepSpeed", "httpx", "timm", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """``report.json`` of the run directory, whole or not at all."""
    report = {**report, "command": " ".join(sys.argv)}
    replace_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    logger.info("finished: %s", folder / "report.json")
