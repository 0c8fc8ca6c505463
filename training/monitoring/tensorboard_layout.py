"""TensorBoard's CUSTOM SCALARS page, which answers "is it healthy?", and its HPARAMS page.

    http://localhost:6006/#custom_scalars

A chart selects its tags by regular expressions, so that it fits every model and task. Tags that a run does not have are
not drawn. docs/monitoring.md explains the charts in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

LAYOUT = {
    "Is it healthy?": {
        "loss and its parts": ["Multiline", ["^train/(loss|contrastive|attribution|mse)$"]],
        "held-out recall, accuracy": ["Multiline", ["^eval/(mean_recall|i2t_r1|t2i_r1|accuracy|mse)$"]],
        "gradient norm": ["Multiline", ["^train/grad_norm$"]],
        "gradient norm by part": ["Multiline", ["^grad_norm/"]],
        "images a second": ["Multiline", ["^train/images_per_second$"]],
        "share of time waiting for data; straggler's lag": [
            "Multiline",
            ["^train/data_wait_share$", "^straggler/lag_share$"],
        ],
        "learning rate": ["Multiline", ["^train/lr$"]],
        "logit scale": ["Multiline", ["^train/logit_scale$"]],
        "bad samples": ["Multiline", ["^data/skipped"]],
    },
    "Speed": {
        "seconds a step": [
            "Margin",
            ["speed/step_seconds_median", "speed/step_seconds_fastest", "speed/step_seconds_slowest"],
        ],
        "images a second and rank": ["Multiline", ["^speed/images_per_second_a_rank$"]],
        "MFU": ["Multiline", ["^speed/mfu$"]],
        "straggler: lag in seconds, its wait for data": [
            "Multiline",
            ["^straggler/lag_seconds$", "^straggler/wait_seconds$"],
        ],
        "straggler: which rank": ["Multiline", ["^straggler/rank$"]],
    },
    "Memory (GB, the worst rank)": {
        "host": ["Multiline", ["^memory/host_"]],
        "accelerator": ["Multiline", ["^memory/accelerator_"]],
    },
}

# Columns of the HPARAMS page; a run fills those of its task.
RESULTS = ("eval/mean_recall", "eval/accuracy", "train/loss", "train/images_per_second")


def hparams_start(config: Mapping[str, Any]) -> tuple[Summary, Summary]:
    """Returns the records that make a run a row of the HPARAMS page. Its results are the scalars of the run."""
    experiment, start, _ = hparams(flat(config), dict.fromkeys(RESULTS, 0.0))
    return experiment, start


def hparams_end() -> Summary:
    """Returns the record that a run is finished."""
    return hparams({}, {})[2]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """``{"run": {"lr": 1.0}}`` -> ``{"run.lr": 1.0}``; lists and flags become text; nulls are left out."""
    found: dict[str, int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool | list):
            found[prefix + name] = str(value).lower() if isinstance(value, bool) else str(value)
        elif value is not None:
            found[prefix + name] = value
    return found
