"""Memory of a rank by ZeRO stage: what DeepSpeed 0.19 holds, and the most that is alive in a step. No torch here.

    memory = estimate(table, Setting(zero=2, ranks=8, precision="bf16", micro_batch=512, share=512))
    memory.peak / 1e9

With P trained parameters, b bytes each, W ranks (Rajbhandari et al., ZeRO, SC 2020, section 3, but as DeepSpeed does):

    stage   parameters   gradients   optimizer: masters + Adam's two moments, float32
    0       b P          b P         8 P, in bf16 and fp16 12 P
    1       b P          b P / W     12 P / W; while micro batches accumulate, gradients are b P
    2       b P          b P / W     12 P / W
    3       b P / W      b P / W     12 P / W; parameters under the persistence threshold stay whole

Under ZeRO 1 and 2 a rank keeps whole the gradient of a parameter that the boundary of its share cuts: with many ranks,
a large embedding outweighs the share. In float32, too, DeepSpeed keeps masters apart from the parameters, from stage 1
on. Frozen parameters stay whole but under ZeRO-3. A step adds activations, which go while gradients come; the bucket
that gradients are reduced in; under ZeRO-3 the parameters that are gathered at the time; features of all ranks and
pieces of their similarity matrix; and at its end a float32 copy of the gradients that are stepped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from priorclip.cluster.plan.model_table import ModelTable

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PERSISTENT = 100_000  # elements: stage3_param_persistence_threshold of cluster/zero
FLATTENED = 500_000_000  # elements that ZeRO-0's all-reduce copies into one buffer at most


@dataclass(frozen=True)
class Setting:
    """A run as far as memory depends on it.

    Args:
        zero: stage
        ranks: W
        precision: fp32, bf16 or fp16
        micro_batch: samples that a rank's model holds at a time
        share: samples of the global batch that a rank has, whose features the losses hold
        checkpointing: activations are recomputed
        offload: none, optimizer (states and their gradients on the host) or all (parameters' shards too)
        bucket: elements of reduce_bucket_size
        buckets: 2 where reductions overlap the backward pass, as on GPUs; else 1
        max_live: elements of stage3_max_live_parameters
        persistent: elements of stage3_param_persistence_threshold
        chunk: side of the pieces of the similarity matrix
    """

    zero: int
    ranks: int
    precision: str
    micro_batch: int
    share: int
    checkpointing: bool = False
    offload: str = "none"
    bucket: int = 50_000_000
    buckets: int = 2
    max_live: int = 1_000_000_000
    persistent: int = PERSISTENT
    chunk: int = 8192


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank's device; ``host`` is what offload puts into the host's memory (or NVMe) instead.

    Args:
        parameters: kept between steps
        gradients: kept after the backward pass
        optimizer: masters and moments
        gathered: whole parameters that ZeRO-3 has at a time
        activations: most that are alive at once
        losses: features of all ranks, their gradients, pieces of the similarity matrix
        bucket: what gradients are reduced in, while the backward pass runs
        peak: most that is alive at once of all that
        host: bytes on the host
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    losses: float
    bucket: float
    peak: float
    host: float


def estimate(table: ModelTable, setting: Setting) -> Memory:
    """The memory of one rank."""
    each = BYTES[setting.precision]
    trained, frozen, ranks = table.trained, table.frozen, setting.ranks
    stage = setting.zero
    parameters = float(each * (trained + frozen))
    gradients, optimizer, gathered = float(each * trained), 12.0 * trained, 0.0
    if stage == 0 and each == 4:
        optimizer = 8.0 * trained
    if stage >= 1:
        optimizer /= ranks
    if stage == 3:
        gradients /= ranks
    elif stage == 2 or (stage == 1 and setting.micro_batch == setting.share):
        gradients = float(each * held_whole(table.tensors, ranks))
    if stage == 3:
        small = sum(table.persistent(setting.persistent))
        whole = parameters
        parameters = whole / ranks + each * small
        gathered = min(float(whole), each * setting.max_live) - each * small
    host = 0.0
    step = stepping(setting, each, trained)
    if setting.offload != "none":
        host, optimizer, step = optimizer + gradients, 0.0, 0.0
        if stage == 3:
            gradients = 0.0
    if setting.offload == "all":
        host, parameters = host + parameters - each * small, each * small
    curve = table.activations[setting.checkpointing]
    levels = [(point.gradients, point.fixed + point.sample * setting.micro_batch) for point in curve]
    bucket = float(each * setting.bucket * (1 if stage == 3 else setting.buckets)) if stage else 0.0
    losses = loss_bytes(table.width, setting)
    kept = parameters + optimizer + (bucket if stage == 3 else 0.0)
    # Under ZeRO-3 the shards' buffer is there from the start; else gradients come one by one.
    backward = max(level + gathered + gradients * (1 if stage == 3 else share) for share, level in levels)
    peak = kept + max(backward + (0.0 if stage == 3 else bucket) + losses, gradients + step)
    return Memory(
        parameters, gradients, optimizer, gathered, max(level for _, level in levels), losses, bucket, peak, host
    )


def held_whole(tensors: list[int], ranks: int) -> int:
    """Elements of all tensors that lie in a rank's share of them, cut ones whole; of the rank that has most."""
    share, place, held = sum(tensors) / ranks, 0, [0] * ranks
    for size in tensors:
        for rank in range(int(place / share), min(ranks - 1, int((place + size - 1) / share)) + 1):
            held[rank] += size
        place += size
    return max(held)


def stepping(setting: Setting, each: int, trained: int) -> float:
    """What the end of a step takes beside the gradients: copies that are reduced, cast or stepped."""
    if setting.zero == 0:
        return (each * min(trained, FLATTENED) if setting.ranks > 1 else 0.0) + (4.0 * trained if each == 2 else 0.0)
    flat = 4.0 * trained / setting.ranks
    copies = (each == 2) + (setting.zero == 1)  # in the run's precision: to be cast, and what ZeRO-1 kept until now
    return flat + copies * each * trained / setting.ranks


def loss_bytes(width: int, setting: Setting) -> float:
    """Features (N, d) of the texts of all ranks with their gradient and two copies, and pieces of (chunk, chunk)."""
    total = setting.share * setting.ranks
    pieces = 2 * min(setting.chunk, setting.share) * min(setting.chunk, total)
    return 4.0 * (4 * total * width + 6 * setting.share * width + pieces)


def largest_micro_batch(table: ModelTable, setting: Setting, limit: float) -> int:
    """Largest divisor of the rank's share that fits into ``limit`` bytes; 0 where not even one sample does."""
    for size in range(setting.share, 0, -1):
        if setting.share % size == 0 and estimate(table, replace(setting, micro_batch=size)).peak <= limit:
            return size
    return 0
