"""The run directory: one run at a time, its resolved configuration, and the speed that an earlier process recorded."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from priorclip.common.files import write_text
from priorclip.common.masking import masked_values
from priorclip.training.config import RunConfig
from priorclip.training.monitoring.read_metrics import records
from priorclip.training.ranks.distributed import Rank
from priorclip.training.ranks.run_lock import lock_folder

CONFIG, NEXT = "config.yaml", ".config.yaml.next"


def prepare_folder(config: Any, run_config: RunConfig, rank: Rank) -> Path:
    """Makes and locks the run directory and writes ``config.yaml``. A collective.

    If there is one, it stays until `accept_config`, because a run that is refused must not change it.

    Args:
        config: the whole dataclass of the command
        run_config: its part for the run
        rank: this process

    Raises:
        ValueError: another run uses the directory, or it cannot be written
    """
    folder, problem = Path(run_config.dir), [""]
    if rank.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            problem = [lock_folder(folder)]
            if not problem[0]:
                write_text(folder / (NEXT if (folder / CONFIG).exists() else CONFIG), to_yaml(config))
        except OSError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])
    return folder


def accept_config(folder: Path, is_first: bool) -> None:
    """Puts the configuration of a run that goes on in the place of the one before."""
    if is_first and (folder / NEXT).exists():
        os.replace(folder / NEXT, folder / CONFIG)


def to_yaml(config: Any) -> str:
    """The dataclass as YAML that ``--config`` reads; secrets are masked."""
    values = masked_values(json.loads(json.dumps(dataclasses.asdict(config))))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def recorded_speed(folder: Path) -> float | None:
    """Median images/s in metrics.jsonl, for a run that an earlier process finished."""
    speeds = [record.get("train/images_per_second") for record in records(folder)]
    known = [speed for speed in speeds if speed]
    return statistics.median(known) if known else None
