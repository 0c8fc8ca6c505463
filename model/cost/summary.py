"""The parts of a preset: trained and frozen parameters, and FLOPs of an image and of a text.

    python -m model summary --preset priorclip-b32

The model is built on the meta device without weights and memory, so the largest preset takes seconds. FLOPs are those
of one forward pass of one image and one text of full length; a multiply-add counts as two (model/cost/flops.py).
"""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from priorclip.model.build import build_model
from priorclip.model.config import ModelConfig
from priorclip.model.cost.activation_memory import Point, activation_curve
from priorclip.model.cost.flops import count_flops, module_flops, total_flops, training_flops
from priorclip.model.cost.peak_tflops import PEAKS
from priorclip.model.encoders.bands import blank_images
from priorclip.model.presets import load_preset
from priorclip.model.without_memory import without_memory

if TYPE_CHECKING:
    from priorclip.model.commands import SummaryConfig

# Module -> part, in the order of the table.
PARTS = {
    "visual.encoder": "vision",
    "vision": "vision",
    "prior": "prior",
    "text": "text",
    "visual.instruction": "instruction",
    "prior_projection": "instruction",
    "visual.narrow": "fusion",
    "visual.layers": "fusion",
    "visual.norm": "fusion",
    "spatial": "Spatial-PAE",
    "temporal": "Temporal-PAE",
    "vision_projection": "heads",
    "image_projection": "heads",
    "text_projection": "heads",
    "image_head": "heads",
    "text_head": "heads",
    "logit_scale": "scales",
    "attribution_scale": "scales",
    "logit_bias": "scales",
    "uncertainty": "heads",
}


@dataclass
class Row:
    """A part of the model.

    Args:
        part: its name
        trained: number of trained parameters
        frozen: number of frozen parameters
        image_flops: of the forward pass of one image
        text_flops: of the forward pass of one text
    """

    part: str
    trained: int = 0
    frozen: int = 0
    image_flops: int = 0
    text_flops: int = 0


def summarise(config: ModelConfig) -> list[Row]:
    """Returns a row for each part, and a last row for the whole model.

    Raises ValueError if the configuration cannot be built, or a parameter belongs to no part.
    """
    with without_memory():
        model = build_model(without_weights(config)).eval()
    rows: dict[str, Row] = {}
    whole = Row("all")
    for name, parameter in model.named_parameters():
        row = rows.setdefault(part := part_of(name), Row(part))
        for counted in (row, whole):
            if parameter.requires_grad:
                counted.trained += parameter.numel()
            else:
                counted.frozen += parameter.numel()
    image, text = forward_flops(model)
    for module, part in PARTS.items():
        if part in rows:
            rows[part].image_flops += image.get(module, 0)
            rows[part].text_flops += text.get(module, 0)
    whole.image_flops, whole.text_flops = image[""], text[""]
    order = list(dict.fromkeys(PARTS.values()))
    return [*sorted(rows.values(), key=lambda row: order.index(row.part)), whole]


def without_weights(config: ModelConfig) -> ModelConfig:
    """Removes the weights from the configuration, in place, and returns it."""
    config.vision.weights = config.prior.weights = config.text.weights = None
    return config


def part_of(name: str) -> str:
    """Returns the part of a parameter. Raises ValueError if the table has none."""
    for module, part in PARTS.items():
        if name == module or name.startswith(f"{module}."):
            return part
    raise ValueError(f"the parameter '{name}' belongs to no part of the table")


def tower_of(name: str) -> str:
    """Returns the part by a parameter's name, also inside wrappers, for the gradient norms of a run.

    Parameters that belong to no part, such as those that a fine-tuning adds, are ``other``.
    """
    words = name.split(".")
    for first in range(len(words)):
        with contextlib.suppress(ValueError):
            return part_of(".".join(words[first:]))
    return "other"


def pair_flops(config: ModelConfig, side: int) -> float:
    """Returns FLOPs of one image-text pair in training; ``config`` is resolved, ``side`` is that of the images."""

    def build() -> nn.Module:
        return build_model(without_weights(copy.deepcopy(config)))

    return training_flops(build, side, config.text.context_length, config.vision.bands)


def forward_flops(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Returns FLOPs by module of one image and of one text; the empty name is the whole model."""
    side, length = model.config.vision.image_size, model.config.text.context_length
    images = blank_images(1, side, model.config.vision.bands, "meta")
    tokens = torch.zeros((1, length), dtype=torch.long, device="meta")
    inputs = ({"images": images}, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    return flops_by_module(model, inputs[0]), flops_by_module(model, inputs[1])


@torch.no_grad()
def flops_by_module(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    with count_flops() as counter:
        model(**inputs)
    found = {module: module_flops(counter, f"{type(model).__name__}.{module}") for module in PARTS}
    return {"": total_flops(counter), **found}


def markdown(preset: str, rows: list[Row]) -> str:
    """Returns the table: millions of parameters, GFLOPs."""
    lines = [
        f"| {preset} | parameters, M | trained, M | frozen, M | GFLOPs an image | GFLOPs a text |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        millions = [f"{count / 1e6:.2f}" for count in (row.trained + row.frozen, row.trained, row.frozen)]
        flops = [f"{count / 1e9:.2f}" if count else "-" for count in (row.image_flops, row.text_flops)]
        lines.append(f"| {' | '.join([row.part, *millions, *flops])} |")
    return "\n".join(lines)


def summary_report(config: SummaryConfig) -> str:
    """Returns the table of a preset as markdown or JSON."""
    rows = summarise(load_preset(config.preset))
    curves = activation_curves(config) if config.memory else {}
    if config.format == "json":
        found = {"preset": config.preset, "parts": [asdict(row) for row in rows]}
        return json.dumps(found | (plan_inputs(config, curves) if config.memory else {}), indent=2)
    return "\n".join([markdown(config.preset, rows), *activation_lines(config, curves)])


def activation_curves(config: SummaryConfig) -> dict[str, list[Point]]:
    """Returns the curves without and with gradient checkpointing."""
    architecture = without_weights(load_preset(config.preset))
    return {
        name: activation_curve(architecture, config.precision, name == "checkpointed")
        for name in ("plain", "checkpointed")
    }


def plan_inputs(config: SummaryConfig, curves: dict[str, list[Point]]) -> dict[str, Any]:
    """Returns the values that ``python -m cluster plan`` reads besides the parts."""
    architecture = without_weights(load_preset(config.preset))
    with without_memory():
        model = build_model(architecture)
    return {
        "precision": config.precision,
        "embed_dim": architecture.embed_dim,
        "tensors": [parameter.numel() for parameter in model.parameters() if parameter.requires_grad],
        "frozen_tensors": [parameter.numel() for parameter in model.parameters() if not parameter.requires_grad],
        "activations": {name: [asdict(point) for point in curve] for name, curve in curves.items()},
        "gpu_tflops": PEAKS,
    }


def activation_lines(config: SummaryConfig, curves: dict[str, list[Point]]) -> list[str]:
    lines = []
    for name, curve in curves.items():
        most = max(curve, key=lambda point: point.sample)
        lines.append(f"activations, {config.precision}, {name}: {most.sample / 1e6:.2f} MB a pair")
    return lines
