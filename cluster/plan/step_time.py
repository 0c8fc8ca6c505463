"""Time of a training step on any number of GPUs, from a model of its parts; weak- and strong-scaling curves.

    python -m cluster simulate --preset priorclip-b32 --gpu H100 --zero 2 --output scaling.png
    python -m cluster simulate --images_per_second 900 --preset priorclip-b32      # measured, of one GPU

A step is, for W ranks with b samples each of a global batch N = W b:

    compute     FLOPs / (peak x MFU), or b / measured images a second; times 1 + cv x E[max of W standard normals],
                for all wait for the slowest (Blom's approximation of the expected maximum)
    loss        four products of b x d and d x N matrices in float32: similarities, computed again in the backward pass,
                and the gradients of both sides (model/losses/retrieval_loss.py). It grows with the global batch
    gradients   ZeRO 0, 1 and 2: all-reduce, for DeepSpeed 0.19 reduces whole buckets and keeps its part; 3: reduce-
                scatter. In buckets, each with its latency; ZeRO 2 and 3 do it after every micro batch
    parameters  ZeRO 1 and 2: one all-gather after the step; 3: one for each micro batch, and those that are used again
                further away than stage3_max_reuse_distance once more in the backward pass; the small ones that stay
                whole are gathered after the step, each by itself, which costs latency
    features    all-gather of N x d text features and the reduce-scatter of their gradient, sums of N numbers
    data        b / (workers x images a second of each); it works beside the GPU: a step takes at least that

A share of the gradients' collectives hides behind the backward pass, two thirds of compute, and under ZeRO-3 of the
parameters' too; features and ZeRO-2's all-gather wait for nobody and nobody for them: they add up. cluster.network has
the collectives. What the model leaves out: congestion between jobs, and topology beyond two levels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist

from priorclip.cluster.plan.network import Network

PARTS = ("compute", "loss", "stragglers", "gradients", "parameters", "features", "data")
BACKWARD = 2 / 3  # share of compute in the backward pass, where a forward pass is one half of it


@dataclass(frozen=True)
class Work:
    """What a step of the model is to a cluster.

    Args:
        seconds_a_sample: of compute, forward and backward, on one rank alone
        seconds_a_step: of compute, whatever the batch
        trained: parameters that are trained
        frozen: parameters that are not, which ZeRO-3 shards too
        bytes_a_parameter: 2 for bf16, 4 for fp32
        width: of the shared embedding space
        loss_flops: a second, in float32, of a rank in the loss; None: it costs nothing
        zero: stage
        micro_batches: of a step
        cached: each micro batch has a forward pass more, for gradient caching
        persistent: parameters under stage3_param_persistence_threshold, their number
        reuse: elements of stage3_max_reuse_distance
        bucket: elements that a collective takes at a time
        overlap: share of the collectives that can hide behind compute; 0 where nothing runs beside it (gloo)
        stragglers: standard deviation of a rank's compute, as a share of it
        loader_rate: images a second that a rank's workers deliver; None: never what is waited for
        cores: CPU ranks share so many, in computing and in collectives, which are copies in memory there; None: each
            rank has a device of its own
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
    """Seconds of a step by part, and what it comes to.

    Args:
        ranks: GPUs
        batch: samples a rank
        compute: without waiting
        loss: products of all pairs' features
        stragglers: waiting for the slowest rank
        gradients: of their collectives, what does not hide
        parameters: of theirs
        features: all of theirs
        data: waiting for the loader
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
    """Of so many standard normal numbers (Blom 1958)."""
    return 0.0 if ranks < 2 else NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def step_time(work: Work, network: Network, ranks: int, batch: float) -> StepTime:
    """Of ``batch`` samples on each of so many ranks."""
    compute = work.seconds_a_step + batch * work.seconds_a_sample
    crowd = 1.0 if work.cores is None else max(1.0, ranks / work.cores)
    compute *= crowd
    loss = crowd * 4 * 2 * batch * ranks * batch * work.width / work.loss_flops if work.loss_flops else 0.0
    waiting = compute * work.stragglers * expected_maximum(ranks)
    gradients, parameters = (crowd * seconds for seconds in collectives(work, network, ranks))
    room = work.overlap * BACKWARD * compute
    hidden = min(gradients, room)
    gradients -= hidden
    if work.zero == 3:
        parameters -= min(parameters, work.overlap * compute - hidden)
        parameters += crowd * network.half(0, ranks, work.persistent)
    features = crowd * feature_exchange(work, network, ranks, batch)
    busy = StepTime(ranks, batch, compute, loss, waiting, gradients, parameters, features, data=0.0)
    loading = batch / work.loader_rate if work.loader_rate else 0.0
    return replace(busy, data=max(0.0, loading - busy.seconds))


def collectives(work: Work, network: Network, ranks: int) -> tuple[float, float]:
    """Seconds of the collectives over gradients and over parameters of a step, nothing hidden."""
    each, whole = work.bytes_a_parameter, work.trained + work.frozen
    size, buckets = work.trained * each, math.ceil(work.trained / work.bucket)
    if work.zero < 3:
        reduced = network.all_reduce(size, ranks, buckets) * (work.micro_batches if work.zero == 2 else 1)
        return reduced, network.half(size, ranks, buckets) if work.zero else 0.0
    again = max(0.0, work.trained - work.reuse / 2)  # of the backward pass; what is frozen has none
    elements = (1 + work.cached) * whole + again
    gathered = network.half(each * elements, ranks, math.ceil(elements / work.bucket))
    return work.micro_batches * network.half(size, ranks, buckets), work.micro_batches * gathered


def feature_exchange(work: Work, network: Network, ranks: int, batch: float) -> float:
    """Text features (N, d) in float32 gathered, their gradient scattered, and three sums of N numbers."""
    rows = ranks * batch
    return 2 * network.half(4 * rows * work.width, ranks) + 3 * network.all_reduce(4 * rows, ranks)


def weak_scaling(work: Work, network: Network, ranks: list[int], batch: float) -> list[StepTime]:
    """The same batch on every rank."""
    return [step_time(work, network, each, batch) for each in ranks]


def strong_scaling(work: Work, network: Network, ranks: list[int], global_batch: int) -> list[StepTime]:
    """The same global batch for all: as many ranks as have a sample each."""
    return [step_time(work, network, each, global_batch / each) for each in ranks if each <= global_batch]


def efficiency(steps: list[StepTime]) -> list[float]:
    """Images a second of a rank, as a share of those where there are fewest ranks."""
    first = steps[0].images_per_second / steps[0].ranks
    return [step.images_per_second / step.ranks / first for step in steps]


def table(steps: list[StepTime]) -> str:
    lines = ["| GPUs | batch a GPU | step, ms | images/s | efficiency | " + " | ".join(PARTS) + " |",
             "|---:" * (5 + len(PARTS)) + "|"]  # fmt: skip
    for step, share in zip(steps, efficiency(steps), strict=True):
        parts = " | ".join(f"{1e3 * getattr(step, name):.1f}" for name in PARTS)
        lines.append(
            f"| {step.ranks} | {step.batch:g} | {1e3 * step.seconds:.1f} | {step.images_per_second:,.0f} |"
            f" {share:.0%} | {parts} |"
        )
    return "\n".join(lines)


def as_dict(step: StepTime) -> dict[str, float]:
    return {**asdict(step), "seconds": step.seconds, "images_per_second": step.images_per_second}


def plot(weak: list[StepTime], strong: list[StepTime], title: str, path: str) -> None:
    """Images a second against GPUs, both curves beside the ideal, and the share of a step's parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, shares) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    ranks = [step.ranks for step in weak]
    one = weak[0].images_per_second / weak[0].ranks
    speed.plot(ranks, [one * each for each in ranks], "--", color="grey", label="ideal")
    speed.plot(ranks, [step.images_per_second for step in weak], "o-", label=f"weak: {weak[0].batch:g} a GPU")
    whole = round(strong[0].ranks * strong[0].batch)
    speed.plot([step.ranks for step in strong], [step.images_per_second for step in strong], "s-",
               label=f"strong: {whole:,} in all")  # fmt: skip
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s", title=title)
    speed.set_xscale("log", base=2)
    speed.set_xticks(ranks, [str(each) for each in ranks])
    speed.legend()
    parts = [[getattr(step, name) / step.seconds for step in weak] for name in PARTS]
    shares.stackplot(range(len(ranks)), parts, labels=PARTS)
    shares.set_xticks(range(len(ranks)), [str(each) for each in ranks])
    shares.set(xlabel="GPUs", ylabel="share of a step", title="weak scaling", ylim=(0, 1))
    shares.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
