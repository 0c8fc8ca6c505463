"""That all ranks stream the same data, asked once before the first step.

refuse_different_data(stream)    # ValueError: ... rank 5 on node-b (batches an epoch 11, data 3f2a...) differ ...
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import torch.distributed as dist

from priorclip.training.stream_protocol import Stream


def refuse_different_data(stream: Stream) -> None:
    """End the run, on every rank, where the ranks do not stream the same data; it is a collective.

    Each rank takes its part of a batch that all must agree on. A node whose shards differ (an older copy, a file that
    is missing, another seed) would repeat some samples and leave out others, or take another number of steps and hang.

    Raises:
        ValueError: names each rank, with its host, whose stream is not that of most ranks.
    """
    mine = socket.gethostname(), {**stream.state_dict(), "batches an epoch": len(stream)}
    found: list[tuple[str, dict[str, Any]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    texts = [", ".join(f"{name} {value}" for name, value in sorted(state.items())) for _, state in found]
    usual = Counter(texts).most_common(1)[0][0]
    others = [f"rank {rank} on {found[rank][0]} ({text})" for rank, text in enumerate(texts) if text != usual]
    if others:
        raise ValueError(
            f"the ranks do not stream the same data: {'; '.join(others)} differ from the others ({usual}). Give every "
            "node the same shards, weights and options; `python -m data_shards verify` finds a copy that is not whole"
        )
