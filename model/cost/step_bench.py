"""Speed of a training step: PriorCLIP and open_clip's model with the same towers, in one run.

    python -m model bench --batch 8                     # float32, on the GPU if there is one
    python -m model bench --batch 512 --dtype bf16 --compile

A step is forward, contrastive loss and backward (with --optimizer also AdamW) on the same pairs. Both models take
turns, so that noise of the machine affects both. The ratio of times should not be above the ratio of FLOPs: then the
prior costs no more than its operations. FLOPs of forward and backward are counted in the warm-up step. The time of
PriorCLIP includes normalisation of uint8 pixels; open_clip gets normalised pixels.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from priorclip.common.output import get_logger
from priorclip.model.build import build_model, parameter_groups
from priorclip.model.cost.flops import count_flops, total_flops
from priorclip.model.cost.peak_tflops import peak_of
from priorclip.model.device import pick_device
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.presets import load_preset

if TYPE_CHECKING:
    from priorclip.model.commands import BenchConfig

log = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class BenchedModel:
    """One model in the comparison.

    Args:
        name: preset or open_clip architecture
        step: one training step
        flops: of a step
        seconds: of each timed step
        cpu_seconds: CPU time of all threads of this process in each step; other processes disturb it less
    """

    name: str
    step: Callable[[], None]
    flops: int
    seconds: list[float]
    cpu_seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Figures:
    """The results of a model.

    Args:
        name: preset or open_clip architecture
        seconds: median time of a step
        images_per_second: pairs per second
        gflops: of a step, forward and backward
        tflops_per_second: TFLOP/s of a step
        mfu: share of the GPU's peak, or None if the peak is unknown
    """

    name: str
    seconds: float
    images_per_second: float
    gflops: float
    tflops_per_second: float
    mfu: float | None


def bench_report(config: BenchConfig) -> str:
    """Times the steps and returns the comparison as a table or JSON."""
    device = pick_device(config.device)
    models = [prepare_preset(config, device)]
    if config.peer is not None:
        models.append(prepare_open_clip(config, device))
    take_turns(models, config.runs, device)
    found = compare(models, config, device)
    return json.dumps(found, indent=2) if config.format == "json" else table(found)


def prepare_preset(config: BenchConfig, device: torch.device) -> BenchedModel:
    """Returns the preset with random weights, ready for steps."""
    settings = load_preset(config.preset)
    settings.vision.weights = settings.prior.weights = settings.text.weights = None
    with torch.device(device):
        model = build_model(settings).train()
    for parameter in model.parameters():  # as in DeepSpeed: buffers keep their dtype
        parameter.data = parameter.data.to(DTYPES[config.dtype])
    side, text = settings.vision.image_size, model.config.text
    vocabulary = (text.config or {})["vocab_size"]
    tokens = draw_tokens(config.batch, text.context_length, vocabulary, device)
    pixels = torch.randint(0, 256, (config.batch, 3, side, side), dtype=torch.uint8, device=device)
    run = torch.compile(model) if config.compile else model
    mask = torch.ones_like(tokens)
    return prepare(config.preset, model, lambda: run(pixels, tokens, mask), lambda: model(pixels, tokens, mask), config)


def prepare_open_clip(config: BenchConfig, device: torch.device) -> BenchedModel:
    """Returns open_clip's model with random weights, ready for steps. Raises ValueError if there is none."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            "open_clip, for the comparison, is not installed: pip install open_clip_torch, or --peer null"
        ) from error
    assert config.peer is not None
    if config.peer not in open_clip.list_models():
        raise ValueError(f"--peer {config.peer}: open_clip has no such model; see open_clip.list_models()")
    model = open_clip.create_model(config.peer, device=device).to(DTYPES[config.dtype]).train()
    visual: Any = model.visual
    tokens = draw_tokens(config.batch, model.context_length, model.vocab_size, device)
    pixels = torch.randn(config.batch, 3, *visual.image_size, dtype=DTYPES[config.dtype], device=device)
    run = torch.compile(model) if config.compile else model

    def outputs(forward: Any) -> dict[str, Tensor]:
        image, text, scale = forward(pixels, tokens)[:3]
        return {"image_features": image, "text_features": text, "logit_scale": scale, "attribution_scale": scale}

    return prepare(config.peer, model, lambda: outputs(run), lambda: outputs(model), config)


def draw_tokens(batch: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """Returns random texts of full length; the last token is the highest id, CLIP's end of text."""
    tokens = torch.randint(1, vocabulary - 1, (batch, length), device=device)
    tokens[:, -1] = vocabulary - 1
    return tokens


def prepare(
    name: str, model: nn.Module, run: Callable[[], Any], eager: Callable[[], Any], config: BenchConfig
) -> BenchedModel:
    """Returns the model with its step, after a warm-up that counts its FLOPs."""
    loss = RetrievalLoss()
    ids = torch.arange(config.batch, device=next(model.parameters()).device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-6) if config.optimizer else None

    def backward(forward: Callable[[], Any]) -> None:
        loss(forward(), ids)[0].backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    with count_flops() as counter:
        backward(eager)
    for _ in range(2 if config.compile else 1):
        backward(run)
    return BenchedModel(name, lambda: backward(run), total_flops(counter), [], [])


def take_turns(models: list[BenchedModel], runs: int, device: torch.device) -> None:
    """Times steps of the models in turn."""
    for turn in range(runs):
        # The first model finds the machine in another state than the second, so the order alternates.
        for one in models if turn % 2 == 0 else models[::-1]:
            synchronise(device)
            begun, begun_cpu = time.perf_counter(), time.process_time()
            one.step()
            synchronise(device)
            one.seconds.append(time.perf_counter() - begun)
            one.cpu_seconds.append(time.process_time() - begun_cpu)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(models: list[BenchedModel], config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Returns the results of each model, and the ratios of the first to the second."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = config.peak_tflops or (peak_of(name, config.dtype) if device.type == "cuda" else None)
    if device.type == "cuda" and peak is None:
        log.warning("the peak of %s is unknown, so there is no MFU: give it by --peak_tflops", name)
    results: dict[str, Any] = {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": config.dtype,
        "batch": config.batch,
        "runs": config.runs,
        "compile": config.compile,
        "optimizer": config.optimizer,
        "peak_tflops": peak,
        "models": [asdict(figures(one, config.batch, peak)) for one in models],
    }
    if len(models) == 2:
        first, second = models
        results["time_ratio"] = median_ratio(first.seconds, second.seconds)
        if device.type == "cpu":
            results["cpu_time_ratio"] = median_ratio(first.cpu_seconds, second.cpu_seconds)
        results["flops_ratio"] = first.flops / second.flops
    return results


def median_ratio(some: list[float], others: list[float]) -> float:
    """Returns the median ratio of steps that were timed side by side."""
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def figures(one: BenchedModel, batch: int, peak: float | None) -> Figures:
    speed = one.flops / one.median / 1e12
    return Figures(
        one.name, one.median, batch / one.median, one.flops / 1e9, speed, None if peak is None else speed / peak
    )


def table(found: dict[str, Any]) -> str:
    """Returns the results as a table."""
    extra = [name for name in ("compile", "optimizer") if found[name]]
    lines = [
        f"{found['device']}, {found['threads']} threads, {found['dtype']}, batch {found['batch']}, "
        f"median of {found['runs']}" + "".join(f", {name}" for name in extra),
        f"{'model':24} {'ms a step':>10} {'images/s':>9} {'GFLOPs a step':>14} {'TFLOP/s':>8} {'MFU':>6}",
    ]
    for one in found["models"]:
        mfu = "-" if one["mfu"] is None else f"{100 * one['mfu']:.1f}%"
        lines.append(
            f"{one['name']:24} {1000 * one['seconds']:>10.1f} {one['images_per_second']:>9.1f} "
            f"{one['gflops']:>14.4g} {one['tflops_per_second']:>8.3g} {mfu:>6}"
        )
    if "time_ratio" in found:
        cpu = f" (CPU times {found['cpu_time_ratio']:.3f})" if "cpu_time_ratio" in found else ""
        lines.append(f"ratio of times {found['time_ratio']:.3f}{cpu}, ratio of FLOPs {found['flops_ratio']:.3f}")
    return "\n".join(lines)
