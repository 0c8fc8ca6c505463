"""Checks once, before the first step, that all ranks stream the same data.

refuse_different_data(stream)    # ValueError: ... rank 5 on node-b (batches an epoch 11, data 3f2a...) differ ...
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import torch.distributed as dist

from priorclip.training.stream_protocol import Stream


def refuse_different_data(stream: Stream) -> None:
    """Ends the run on every rank if the ranks do not stream the same data. A collective.

    Each rank takes its part of a common global batch. If the shards of a node differ (an older copy, a missing file,
    another seed), the run repeats some samples and omits others, or its ranks take different numbers of steps and hang.

    Raises:
        ValueError: names each rank, with its host, whose stream differs from that of most ranks
    """
    own = socket.gethostname(), {**stream.state_dict(), "batches an epoch": len(stream)}
    found: list[tuple[str, dict[str, Any]]] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    texts = [", ".join(f"{name} {value}" for name, value in sorted(state.items())) for _, state in found]
    usual = Counter(texts).most_common(1)[0][0]
    others = [f"rank {rank} on {found[rank][0]} ({text})" for rank, text in enumerate(texts) if text != usual]
    if others:
        raise ValueError(
            f"the ranks do not stream the same data: {'; '.join(others)} differ from the others ({usual}). Give every "
            "node the same shards, weights and options; `python -m data_shards verify` finds incomplete copies"
        )
