"""Time of collectives on a cluster of equal nodes: of ring and tree we take the faster one.

    network = Network(gpus_per_node=8, intra_gbytes=300, inter_gbytes=50)
    network.all_reduce(600e6, ranks=64)          # seconds

A ring moves (W - 1) / W of the bytes through every link for a reduce-scatter or an all-gather, and twice that for an
all-reduce, in W - 1 hops each. Between nodes the slowest link counts: all network cards of a node together, because a
ring passes each node once. A tree needs log2 W hops and moves the bytes twice. (Thakur, Rabenseifner, Gropp:
Optimization of Collective Communication Operations in MPICH, 2005; NCCL's bus bandwidth is defined the same way.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Network:
    """Links of a cluster. Bandwidths are those that a collective reaches, not those of the data sheet.

    Args:
        gpus_per_node: ranks on a node
        intra_gbytes: GB/s of a rank to its neighbour in the node (NVLink: 300, PCIe: 20)
        inter_gbytes: GB/s of a node to the next, all network cards together (8 x 400 Gb/s: 320, 100 Gb/s Ethernet: 10)
        intra_microseconds: latency of a hop in the node
        inter_microseconds: latency of a hop between nodes
    """

    gpus_per_node: int = 8
    intra_gbytes: float = 200.0
    inter_gbytes: float = 40.0
    intra_microseconds: float = 5.0
    inter_microseconds: float = 15.0

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "intra_gbytes", "inter_gbytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"network.{name} must be over 0, not {getattr(self, name)}")
        for name in ("intra_microseconds", "inter_microseconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"network.{name} must not be negative, but is {getattr(self, name)}")

    def link(self, ranks: int) -> tuple[float, float]:
        """(bytes a second, seconds a hop) of the slowest link between ``ranks`` ranks."""
        if ranks <= self.gpus_per_node:
            return self.intra_gbytes * 1e9, self.intra_microseconds * 1e-6
        return min(self.intra_gbytes, self.inter_gbytes) * 1e9, self.inter_microseconds * 1e-6

    def gather_or_scatter(self, size: float, ranks: int, calls: int = 1) -> float:
        """Seconds of an all-gather or a reduce-scatter of ``size`` bytes in total, in ``calls`` calls."""
        if ranks < 2:
            return 0.0
        speed, hop = self.link(ranks)
        ring = (ranks - 1) / ranks * size / speed + calls * self.ring_hops(ranks)
        return min(ring, size / speed + calls * math.ceil(math.log2(ranks)) * hop)

    def all_reduce(self, size: float, ranks: int, calls: int = 1) -> float:
        """Seconds of an all-reduce of ``size`` bytes in ``calls`` calls."""
        return 2 * self.gather_or_scatter(size, ranks, calls)

    def ring_hops(self, ranks: int) -> float:
        """Seconds of an empty message once around the ring: hops inside the nodes and between them."""
        nodes = math.ceil(ranks / self.gpus_per_node)
        between = nodes if nodes > 1 else 0
        return ((ranks - 1 - between) * self.intra_microseconds + between * self.inter_microseconds) * 1e-6
