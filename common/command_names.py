"""The packages that are commands, and the module that each of them is.

module_of("pretrain")              -> "priorclip.pretrain"
module_of("tests.cluster.toy_run") -> "tests.cluster.toy_run"
"""

from __future__ import annotations

PACKAGES = ("cluster", "data_shards", "experiments", "finetune", "model", "pretrain", "retrieval")


def module_of(command: str) -> str:
    """The module of ``python -m`` for a command of ours. Another name is a module of the user's and stays as it is."""
    return f"priorclip.{command}" if command.split(".")[0] in PACKAGES else command
