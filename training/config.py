"""Options of every run: where it writes, optimizer, DeepSpeed, checkpoints, monitoring. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        lr: peak learning rate
        betas: AdamW's momentum coefficients
        eps: AdamW's epsilon
        weight_decay: decoupled decay, not applied to norms, biases and scales
        layer_decay: learning rate of an encoder layer divided by that of the next layer; the last layer has lr times
            this factor, and parameters outside the encoders have lr; 1 for the same rate everywhere
        schedule: shape after the warm-up; cosine and linear end at min_lr_share of the peak
        warmup: number of steps if 1 or more, share of the run if less
        min_lr_share: learning rate at the end, as a share of the peak
        clip_grad_norm: global gradient norm limit, 0 for none
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    layer_decay: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    min_lr_share: float = 0.0
    clip_grad_norm: float = 1.0


@dataclass
class EngineConfig:
    """DeepSpeed: ZeRO stage, precision, batch sizes.

    Args:
        zero: ZeRO stage 0 to 3, or zero2-offload, zero3-offload, zero3-nvme (cluster/zero/*.json), or the path of a
            DeepSpeed JSON whose "auto" values are filled in
        nvme_path: folder on a disk of each node, for offload to nvme
        precision: number format of parameters and activations; the optimizer keeps float32 under bf16 and fp16
        global_batch: samples of a step over all ranks; the world size must divide it
        micro_batch: samples that a rank computes at a time, null for global_batch / world size; fewer need less memory
        grad_cache: if micro_batch is smaller, losses over features still see the whole global batch; this costs one
            more forward pass, about a third of the time. false: gradient accumulation, in which the contrastive loss
            sees the negatives of one micro batch only
        grad_checkpointing: recompute activations in the backward pass: less memory, about a third more time
        compile: compile the model by torch.compile: default, or max-autotune, which tries several kernels of each
            product and takes minutes. Results are those without it up to rounding; see training/engine/compiling.py
        matmul_precision: how exact products of float32 matrices are: highest, or high (TF32 on NVIDIA cards from Ampere
            on, with 10 bits of mantissa) or medium (bfloat16), as torch.set_float32_matmul_precision. The losses are
            such products under every ``precision``
        threads: CPU threads of a rank, null for the cores of the machine divided by its ranks
        timeout_minutes: a collective that waits longer than this ends the run
        hang_minutes: end the run, and name the rank, if a rank is stopped or no rank makes progress for this time; 0
            for never
    """

    zero: str = "2"
    nvme_path: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    global_batch: int = 128
    micro_batch: int | None = None
    grad_cache: bool = True
    grad_checkpointing: bool = False
    compile: Literal["off", "default", "max-autotune"] = "off"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    threads: int | None = None
    timeout_minutes: float = 10
    hang_minutes: float = 5


@dataclass
class CheckpointConfig:
    """Checkpoints of the run.

    Args:
        every: steps between checkpoints, 0 for the end of each epoch only
        keep: number of newest checkpoints to keep
        keep_every: write and keep for ever the checkpoints at multiples of this number of steps, 0 for none
        best: evaluation metric whose best checkpoint is written and kept, null for none
        best_is: max or min of that metric
        background: write while the run continues, from a copy in host memory; false: the run waits
        failures: end the run if this number of checkpoints in a row could not be written
        resume: continue from the newest checkpoint of the run directory whose checksums match, if there is one. It need
            not come from you, because a file that could run code is refused. If there are checkpoints and none can be
            read, the run does not start. false: start over, and move the checkpoints to checkpoints/set-aside
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0
    best: str | None = "mean_recall"
    best_is: Literal["max", "min"] = "max"
    background: bool = True
    failures: int = 3
    resume: bool = True


@dataclass
class MonitorConfig:
    """Monitoring of the run besides metrics.jsonl and TensorBoard.

    Args:
        prometheus_port: port on which rank 0 serves the metrics to Prometheus; null for no endpoint
        prometheus_address: address on which it listens; the default answers on this host only
        peak_tflops: dense TFLOP/s of the accelerator, for the MFU; null for the value known for its name
        trackers: wandb, mlflow or both, as a list; they get configuration and metrics, and an error of one never ends
            the run
    """

    prometheus_port: int | None = None
    prometheus_address: str = "127.0.0.1"
    peak_tflops: float | None = None
    trackers: list[Literal["wandb", "mlflow"]] = field(default_factory=list)


@dataclass
class BadStepConfig:
    """Steps whose loss or gradient is not finite, or whose loss is far above those before; see training/bad_steps.py.

    Args:
        action: raise ends the run; skip takes no optimizer step; rollback returns to the newest good checkpoint and
            continues with the data after the bad batch
        spike: a loss above this many times the median of the last steps is bad too, 0 for no such limit
        window: number of steps for the median
        limit: the run ends after more bad steps than this
    """

    action: Literal["raise", "skip", "rollback"] = "raise"
    spike: float = 0.0
    window: int = 100
    limit: int = 10


@dataclass
class AverageConfig:
    """Exponential moving average of the weights (EMA). If there is one, the run evaluates and exports it.

    Args:
        decay: share of the average that remains at each step, e.g. 0.999; 0 for no average
        warmup: start with a smaller decay, 1 - step ** (-2/3), until it reaches ``decay``
    """

    decay: float = 0.0
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"run.average.decay must be in [0, 1), not {self.decay}")


@dataclass
class RunConfig:
    """The run itself.

    Args:
        dir: run directory: config.yaml, metrics.jsonl, TensorBoard events, checkpoints/, export/, report.json
        epochs: passes over the training shards
        max_steps: stop after this number of steps, 0 for no limit; the learning rate schedule ends there too
        seed: seed of initialisation, sample order, augmentation and dropout
        log_every: steps between records in metrics.jsonl and TensorBoard; other steps are not measured
        evaluate_every: epochs between evaluations, 0 for the end of the run only
        export: the last weights, or those of the best evaluation by checkpoint.best
        patience: stop after this number of evaluations without a better one by checkpoint.best, 0 for never
        progress: rank 0 shows the progress: a bar on a terminal, a line a minute in a log
        deterministic: use deterministic kernels only: every run with the same world size has the same results
    """

    dir: str
    epochs: int = 1
    max_steps: int = 0
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 1
    export: Literal["last", "best"] = "last"
    patience: int = 0
    progress: bool = True
    deterministic: bool = False
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise ValueError(f"run.patience must not be negative, but is {self.patience}")
        if (self.patience or self.export == "best") and self.checkpoint.best is None:
            raise ValueError("run.patience and run.export best need run.checkpoint.best: the metric to compare")
