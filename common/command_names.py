"""The packages that are commands, and the module of each.

module_of("pretrain")              -> "priorclip.pretrain"
module_of("tests.toy_run") -> "tests.toy_run"
"""

from __future__ import annotations

PACKAGES = ("cluster", "data_shards", "experiments", "finetune", "model", "pretrain", "retrieval")


def module_of(command: str) -> str:
    """Returns the module for ``python -m`` of one of our commands. Other names are modules of the user and stay."""
    return f"priorclip.{command}" if command.split(".")[0] in PACKAGES else command
