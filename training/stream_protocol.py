"""What a run needs of its data stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

Batch = dict[str, Any]


class Stream(Protocol):
    """Endless batches of this rank, the number of batches in an epoch, and a position that a checkpoint keeps.

    A batch has the key ``epoch``. A stream may have ``skipped``: counts of bad samples by reason.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...
