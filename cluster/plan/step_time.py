"""Time of a training step on any number of GPUs, as the sum of its parts.

    step = step_time(Work(seconds_a_sample=1 / 900, trained=150_000_000), Network(), ranks=64, batch=512)
    step.seconds, step.gradients, step.images_per_second

A step on W ranks with b samples each has a global batch N = W b. Its parts:

    compute     FLOPs / (peak x MFU), or b / measured images a second
    stragglers  compute x cv x E[max of W standard normals], because all ranks wait for the slowest one (Blom's
                approximation of the expected maximum)
    loss        four products of b x d and d x N matrices in float32: similarities, which the backward pass computes
                again, and the gradients of both sides (model/losses/retrieval_loss.py). It grows with the global batch
    gradients   ZeRO 0, 1 and 2: all-reduce, because DeepSpeed 0.19 reduces whole buckets and keeps its share; ZeRO 3:
                reduce-scatter. In buckets, each with its latency; ZeRO 2 and 3 reduce after every micro batch
    parameters  ZeRO 1 and 2: one all-gather after the step; ZeRO 3: one for each micro batch, and a second one in the
                backward pass for parameters whose next use is further away than stage3_max_reuse_distance. After the
                step ZeRO 3 gathers each small parameter that is not sharded by itself, which costs latency
    features    all-gather of N x d text features and reduce-scatter of their gradient, and sums of N numbers
    data        b / (workers x images a second of each). Loading runs beside the GPU: a step takes at least this time

A share of the gradients' collectives overlaps with the backward pass, which is two thirds of compute. Under ZeRO-3 the
collectives of parameters overlap too. Features and ZeRO-2's all-gather overlap with nothing: their time is added.
network.py has the time of a collective. The model ignores congestion between jobs and topology beyond two levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

from priorclip.cluster.plan.network import Network

PARTS = ("compute", "loss", "stragglers", "gradients", "parameters", "features", "data")
BACKWARD = 2 / 3  # share of compute in the backward pass, which is two forward passes


@dataclass(frozen=True)
class Work:
    """The work of one step.

    Args:
        seconds_a_sample: compute a sample, forward and backward, on one rank alone
        seconds_a_step: compute a step that does not depend on the batch
        trained: trained parameters
        frozen: frozen parameters, which ZeRO-3 shards too
        bytes_a_parameter: 2 for bf16, 4 for fp32
        width: dimension of the embedding space
        loss_flops: FLOP/s of a rank in the loss, in float32; None: the loss takes no time
        zero: ZeRO stage
        micro_batches: micro batches of a step
        cached: gradient caching, which adds a forward pass to each micro batch
        persistent: number of parameters under stage3_param_persistence_threshold
        reuse: elements of stage3_max_reuse_distance
        bucket: elements of one collective
        overlap: share of the collectives that can overlap with compute; 0 if nothing overlaps (gloo)
        stragglers: standard deviation of a rank's compute, as a share of it
        loader_rate: images a second from a rank's workers; None: loading takes no time
        cores: cores that CPU ranks share, for compute and for collectives, which are copies in memory there; None: each
            rank has its own device
    """

    seconds_a_sample: float
    seconds_a_step: float = 0.0
    trained: int = 0
    frozen: int = 0
    bytes_a_parameter: int = 2
    width: int = 512
    loss_flops: float | None = None
    zero: int = 2
    micro_batches: int = 1
    cached: bool = False
    persistent: int = 0
    reuse: int = 1_000_000_000
    bucket: int = 50_000_000
    overlap: float = 0.8
    stragglers: float = 0.02
    loader_rate: float | None = None
    cores: int | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part.

    Args:
        ranks: number of GPUs
        batch: samples a rank
        compute: forward and backward pass
        loss: products of the features of all pairs
        stragglers: wait for the slowest rank
        gradients: their collectives, without the overlap
        parameters: their collectives, without the overlap
        features: their collectives
        data: wait for the loader
    """

    ranks: int
    batch: float
    compute: float
    loss: float
    stragglers: float
    gradients: float
    parameters: float
    features: float
    data: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def images_per_second(self) -> float:
        return self.ranks * self.batch / self.seconds


def expected_maximum(ranks: int) -> float:
    """Expected maximum of ``ranks`` standard normal numbers (Blom 1958)."""
    return 0.0 if ranks < 2 else NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def step_time(work: Work, network: Network, ranks: int, batch: float) -> StepTime:
    """Time of a step with ``batch`` samples on each of ``ranks`` ranks."""
    compute = work.seconds_a_step + batch * work.seconds_a_sample
    slowdown = 1.0 if work.cores is None else max(1.0, ranks / work.cores)
    compute *= slowdown
    loss = slowdown * 4 * 2 * batch * ranks * batch * work.width / work.loss_flops if work.loss_flops else 0.0
    waiting = compute * work.stragglers * expected_maximum(ranks)
    gradients, parameters = (slowdown * seconds for seconds in collectives(work, network, ranks))
    overlapped = min(gradients, work.overlap * BACKWARD * compute)
    gradients -= overlapped
    if work.zero == 3:
        parameters -= min(parameters, work.overlap * compute - overlapped)
        parameters += slowdown * network.gather_or_scatter(0, ranks, work.persistent)
    features = slowdown * feature_exchange(work, network, ranks, batch)
    busy = StepTime(ranks, batch, compute, loss, waiting, gradients, parameters, features, data=0.0)
    loading = batch / work.loader_rate if work.loader_rate else 0.0
    return replace(busy, data=max(0.0, loading - busy.seconds))


def collectives(work: Work, network: Network, ranks: int) -> tuple[float, float]:
    """Seconds of the collectives of gradients and of parameters in a step, without overlap."""
    bytes_each, whole = work.bytes_a_parameter, work.trained + work.frozen
    size, buckets = work.trained * bytes_each, math.ceil(work.trained / work.bucket)
    if work.zero < 3:
        reduced = network.all_reduce(size, ranks, buckets) * (work.micro_batches if work.zero == 2 else 1)
        return reduced, network.gather_or_scatter(size, ranks, buckets) if work.zero else 0.0
    # Gathered again for the backward pass, which frozen parameters do not need.
    again = max(0.0, work.trained - work.reuse / 2)
    elements = (1 + work.cached) * whole + again
    gathered = network.gather_or_scatter(bytes_each * elements, ranks, math.ceil(elements / work.bucket))
    return work.micro_batches * network.gather_or_scatter(size, ranks, buckets), work.micro_batches * gathered


def feature_exchange(work: Work, network: Network, ranks: int, batch: float) -> float:
    """Seconds to gather text features (N, d) in float32, scatter their gradient, and sum N numbers three times."""
    rows = ranks * batch
    return 2 * network.gather_or_scatter(4 * rows * work.width, ranks) + 3 * network.all_reduce(4 * rows, ranks)
