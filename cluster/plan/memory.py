"""Memory of a rank by ZeRO stage, as DeepSpeed 0.19 uses it: parameters, optimizer state, and the peak of a step.

    memory = estimate_memory(table, Setting(zero=2, ranks=8, precision="bf16", micro_batch=512, share=512))
    memory.peak / 1e9

With P trained parameters, b bytes each, W ranks (Rajbhandari et al., ZeRO, SC 2020, section 3, adapted to DeepSpeed):

    stage   parameters   gradients   optimizer: master parameters + Adam's two moments, float32
    0       b P          b P         8 P, in bf16 and fp16 12 P
    1       b P          b P / W     12 P / W; while micro batches accumulate, gradients are b P
    2       b P          b P / W     12 P / W
    3       b P / W      b P / W     12 P / W; parameters under the persistence threshold are not sharded

Under ZeRO 1 and 2 the boundary of a rank's share can cut a parameter. Then the rank keeps the whole gradient of this
parameter: with many ranks, a large embedding outweighs the share. From stage 1 on, DeepSpeed keeps master parameters in
float32 runs too. Frozen parameters are sharded only under ZeRO-3. A step adds: activations, which are freed while
gradients are computed; the bucket in which gradients are reduced; under ZeRO-3 the gathered parameters; the features of
all ranks and pieces of their similarity matrix; and at its end a float32 copy of the gradients for the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from priorclip.cluster.plan.model_table import ModelTable

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PERSISTENT = 100_000  # elements: stage3_param_persistence_threshold in training/engine/zero
FLATTENED = 500_000_000  # elements: largest buffer of ZeRO-0's all-reduce


@dataclass(frozen=True)
class Setting:
    """The settings of a run that its memory depends on.

    Args:
        zero: ZeRO stage
        ranks: number of ranks W
        precision: fp32, bf16 or fp16
        micro_batch: samples of one forward pass of a rank
        share: samples of the global batch on a rank; the losses hold their features
        checkpointing: recompute activations in the backward pass
        offload: none, optimizer (optimizer state and gradients on the host) or all (parameter shards too)
        bucket: elements of reduce_bucket_size
        buckets: 2 if reductions overlap the backward pass, as on GPUs; otherwise 1
        max_live: elements of stage3_max_live_parameters
        persistent: elements of stage3_param_persistence_threshold
        chunk: rows and columns of the pieces of the similarity matrix
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
    """Bytes on the device of a rank; ``host`` is the part that offload moves to the memory of the host (or to NVMe).

    Args:
        parameters: kept between steps
        gradients: kept after the backward pass
        optimizer: master parameters and moments
        gathered: whole parameters that ZeRO-3 gathers, at most at one time
        activations: at most at one time
        losses: features of all ranks, their gradients, pieces of the similarity matrix
        bucket: buffers in which gradients are reduced during the backward pass
        peak: largest sum of all parts at one time
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


def estimate_memory(table: ModelTable, setting: Setting) -> Memory:
    """Estimates the memory of one rank."""
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
        gradients = float(each * largest_share(table.tensors, ranks))
    if stage == 3:
        small = sum(table.persistent(setting.persistent))
        whole = parameters
        parameters = whole / ranks + each * small
        gathered = min(float(whole), each * setting.max_live) - each * small
    host = 0.0
    step = step_buffers(setting, each, trained)
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
    # ZeRO-3 allocates the buffer of gradient shards at the start; other stages allocate gradients one by one.
    backward = max(level + gathered + gradients * (1 if stage == 3 else share) for share, level in levels)
    peak = kept + max(backward + (0.0 if stage == 3 else bucket) + losses, gradients + step)
    return Memory(
        parameters, gradients, optimizer, gathered, max(level for _, level in levels), losses, bucket, peak, host
    )


def largest_share(tensors: list[int], ranks: int) -> int:
    """Elements of all tensors that overlap a rank's share, tensors counted whole; the largest over ranks."""
    share, start, elements = sum(tensors) / ranks, 0, [0] * ranks
    for size in tensors:
        for rank in range(int(start / share), min(ranks - 1, int((start + size - 1) / share)) + 1):
            elements[rank] += size
        start += size
    return max(elements)


def step_buffers(setting: Setting, each: int, trained: int) -> float:
    """Bytes of the buffers at the end of a step: copies of gradients that are reduced, cast or passed to Adam."""
    if setting.zero == 0:
        return (each * min(trained, FLATTENED) if setting.ranks > 1 else 0.0) + (4.0 * trained if each == 2 else 0.0)
    flat = 4.0 * trained / setting.ranks
    copies = (each == 2) + (setting.zero == 1)  # in the precision of the run: one to cast, one that ZeRO-1 still holds
    return flat + copies * each * trained / setting.ranks


def loss_bytes(width: int, setting: Setting) -> float:
    """Bytes of text features (N, d) of all ranks, their gradient and two copies, and of (chunk, chunk) pieces."""
    total = setting.share * setting.ranks
    pieces = 2 * min(setting.chunk, setting.share) * min(setting.chunk, total)
    return 4.0 * (4 * total * width + 6 * setting.share * width + pieces)


def largest_micro_batch(table: ModelTable, setting: Setting, limit: float) -> int:
    """Largest divisor of the rank's share that fits into ``limit`` bytes; 0 if not even one sample fits."""
    for size in range(setting.share, 0, -1):
        if setting.share % size == 0 and estimate_memory(table, replace(setting, micro_batch=size)).peak <= limit:
            return size
    return 0
