"""What every run is told: where it writes, how it optimises, how DeepSpeed shards it. No torch is imported here."""

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
        layer_decay: learning rate of an encoder's layer as a share of that of the layer after it; the last layer has
            this share of lr, what is no encoder has lr itself; 1 for the same everywhere
        schedule: shape after the warm-up; cosine and linear end at min_lr_share of the peak
        warmup: steps if 1 or more, else a share of the run
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
    """DeepSpeed.

    Args:
        zero: ZeRO stage 0 to 3, or zero2-offload, zero3-offload, zero3-nvme (cluster/zero/*.json), or the path of a
            DeepSpeed JSON whose "auto" values are filled in
        nvme_path: folder on a disk of each node, for offload to nvme
        precision: number format of parameters and activations; the optimizer keeps float32 under bf16 and fp16
        global_batch: samples a step over all ranks; the world size must divide it
        micro_batch: samples a rank at a time, null for global_batch / world size. Fewer means less memory
        grad_cache: with fewer, the losses over features still see the whole global batch, at the price of one more
            forward pass, about a third of the time; false: gradient accumulation, where the contrastive loss sees the
            negatives of one micro step only
        grad_checkpointing: recompute activations in the backward pass: less memory, about a third more time
        threads: CPU threads a rank, null for the cores of the machine divided by its ranks
        timeout_minutes: a collective that waits longer than this ends the run
        hang_minutes: a rank that is stopped, or a run in which no rank's code moves, for so long is named and ended; 0:
            never
    """

    zero: str = "2"
    nvme_path: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    global_batch: int = 128
    micro_batch: int | None = None
    grad_cache: bool = True
    grad_checkpointing: bool = False
    threads: int | None = None
    timeout_minutes: float = 10
    hang_minutes: float = 5


@dataclass
class CheckpointConfig:
    """Checkpoints of the run.

    Args:
        every: steps between checkpoints, 0 for the end of each epoch only
        keep: how many of the newest are kept
        keep_every: checkpoints at multiples of this many steps are made and kept for ever, 0 for none
        best: evaluation figure whose best checkpoint is made and kept, null for none
        best_is: max or min of that figure
        background: write while the run goes on, from a copy in host memory; false: the run waits
        failures: so many checkpoints in a row that could not be written end the run
        resume: continue from the run directory's newest checkpoint that verifies, where there is one
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
    """What the run tells while it goes on, besides metrics.jsonl and TensorBoard.

    Args:
        prometheus_port: rank 0 serves the figures there for Prometheus to scrape; null for no endpoint
        prometheus_address: of the interface it listens on; the default answers on this host only
        peak_tflops: dense TFLOP/s of the accelerator, for the MFU; null looks its name up
    """

    prometheus_port: int | None = None
    prometheus_address: str = "127.0.0.1"
    peak_tflops: float | None = None


@dataclass
class BadStepConfig:
    """Steps whose loss or gradient is not a number, or whose loss is far above those before; see training/bad_steps.py.

    Args:
        action: raise ends the run; skip takes no optimizer step; rollback goes back to the newest good checkpoint and
            goes on with the data after the offending batch
        spike: a loss of more than this many times the median of the last steps is bad too, 0 for none
        window: steps that the median is taken over
        limit: bad steps in the whole run before it ends after all
    """

    action: Literal["raise", "skip", "rollback"] = "raise"
    spike: float = 0.0
    window: int = 100
    limit: int = 10


@dataclass
class AverageConfig:
    """Exponential moving average of the weights (EMA), which is then what is evaluated and exported.

    Args:
        decay: share that the average keeps of itself at each step, e.g. 0.999; 0 for no average
        warmup: begin with a smaller decay, 1 - step ** (-2/3), until it reaches that
    """

    decay: float = 0.0
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"run.average.decay must lie in [0, 1), not {self.decay}")


@dataclass
class RunConfig:
    """The run itself.

    Args:
        dir: run directory: config.yaml, metrics.jsonl, TensorBoard events, checkpoints/, export/, report.json
        epochs: passes over the training shards
        max_steps: stop after this many steps, 0 for no limit; the schedule is laid out for the steps that are run
        seed: of initialisation, sample order, augmentation and dropout
        log_every: steps between records in metrics.jsonl and TensorBoard; only in those is anything measured
        evaluate_every: epochs between evaluations, 0 for the end of the run only
        export: the last weights, or those of the best evaluation by checkpoint.best
        patience: stop after so many evaluations without a better one by checkpoint.best, 0 for never
        progress: show a progress bar on rank 0
        deterministic: only deterministic kernels: the same figures on every run with the same world size
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
            raise ValueError("run.patience and run.export best need run.checkpoint.best: the figure to judge by")
