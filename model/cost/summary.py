"""What a preset is made of: parameters by part, trained and frozen, and FLOPs of an image and of a text.

    python -m model summary --preset priorclip-b32

The model is built on the meta device: no weights are read and no memory is taken, so the largest preset takes seconds.
FLOPs are of one forward pass of one image and one text of full length, a multiply-add as two (see model.flops).
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
from priorclip.model.cost.flops import count_flops, total, training_flops, under
from priorclip.model.cost.peak_tflops import PEAKS
from priorclip.model.presets import load_preset

if TYPE_CHECKING:
    from priorclip.model.commands import SummaryConfig

# Module of the model -> the part that it belongs to, in the order of the table.
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
}


@dataclass
class Row:
    """A part of the model.

    Args:
        part: its name
        trained: parameters that are trained
        frozen: parameters that are not
        image_flops: of the forward pass of one image
        text_flops: of the forward pass of one text
    """

    part: str
    trained: int = 0
    frozen: int = 0
    image_flops: int = 0
    text_flops: int = 0


def summarise(config: ModelConfig) -> list[Row]:
    """A row for each part, and the last for all of the model.

    Raises ValueError where the configuration cannot be built, or a parameter belongs to no part.
    """
    with torch.device("meta"):
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
    """The architecture alone. The configuration is a copy of its own already."""
    config.vision.weights = config.prior.weights = config.text.weights = None
    return config


def part_of(name: str) -> str:
    """The part that a parameter belongs to. Raises ValueError where that is none of the table."""
    for module, part in PARTS.items():
        if name == module or name.startswith(f"{module}."):
            return part
    raise ValueError(f"the parameter '{name}' belongs to no part of the table")


def tower_of(name: str) -> str:
    """The part of any model of this package by a parameter's name, wrapped ones too: for the gradient norms of a run.

    What a fine-tuning adds is ``other``.
    """
    words = name.split(".")
    for first in range(len(words)):
        with contextlib.suppress(ValueError):
            return part_of(".".join(words[first:]))
    return "other"


def pair_flops(config: ModelConfig, side: int) -> float:
    """FLOPs of one image-text pair in training; ``config`` is that of a model (resolved), ``side`` of the images."""

    def build() -> nn.Module:
        return build_model(without_weights(copy.deepcopy(config)))

    return training_flops(build, side, config.text.context_length)


def forward_flops(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs by module of one image and of one text; the whole model's under the empty name."""
    side, length = model.config.vision.image_size, model.config.text.context_length
    images = torch.zeros((1, 3, side, side), dtype=torch.uint8, device="meta")
    tokens = torch.zeros((1, length), dtype=torch.long, device="meta")
    inputs = ({"images": images}, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    return counted(model, inputs[0]), counted(model, inputs[1])


@torch.no_grad()
def counted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    with count_flops() as counter:
        model(**inputs)
    found = {module: under(counter, f"{type(model).__name__}.{module}") for module in PARTS}
    return {"": total(counter), **found}


def markdown(preset: str, rows: list[Row]) -> str:
    """The table for people: millions of parameters, GFLOPs."""
    lines = [
        f"| {preset} | parameters, M | trained, M | frozen, M | GFLOPs an image | GFLOPs a text |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        millions = [f"{count / 1e6:.2f}" for count in (row.trained + row.frozen, row.trained, row.frozen)]
        flops = [f"{count / 1e9:.2f}" if count else "-" for count in (row.image_flops, row.text_flops)]
        lines.append(f"| {' | '.join([row.part, *millions, *flops])} |")
    return "\n".join(lines)


def report(config: SummaryConfig) -> str:
    """The table of a preset, as markdown or JSON."""
    rows = summarise(load_preset(config.preset))
    curves = activation_curves(config) if config.memory else {}
    if config.format == "json":
        found = {"preset": config.preset, "parts": [asdict(row) for row in rows]}
        return json.dumps(found | (for_planning(config, curves) if config.memory else {}), indent=2)
    return "\n".join([markdown(config.preset, rows), *activation_lines(config, curves)])


def activation_curves(config: SummaryConfig) -> dict[str, list[Point]]:
    """Without and with gradient checkpointing."""
    architecture = without_weights(load_preset(config.preset))
    return {
        name: activation_curve(architecture, config.precision, name == "checkpointed")
        for name in ("plain", "checkpointed")
    }


def for_planning(config: SummaryConfig, curves: dict[str, list[Point]]) -> dict[str, Any]:
    """What ``python -m cluster plan`` reads beside the parts."""
    architecture = without_weights(load_preset(config.preset))
    with torch.device("meta"):
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
