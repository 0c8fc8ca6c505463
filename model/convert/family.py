"""Common parts of the families of checkpoints: their requests, their results, and CLIP's sizes.

A family is a module of this package with `recognises(state)` and `convert(checkpoint, request)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch

from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig, ModelConfig, TextConfig
from priorclip.model.convert.checkpoint import Checkpoint
from priorclip.model.convert.rules import Rule, fill
from priorclip.model.encoders.weights import State
from priorclip.model.without_memory import without_memory

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
SIZES = {  # width, layers -> the name of a ViT of CLIP in timm and in the papers
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
    (1664, 48): "gigantic",
}
VISION_BLOCKS = dict(SIZES.keys())  # width -> blocks of the published towers
TEXT_BLOCKS = {512: 12, 768: 12, 1024: 24, 1280: 32}
NOT_NAMED = ""  # a tokenizer that the user has to name
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # all others: 64
TEXT_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Request:
    """The user's options for a conversion.

    Args:
        family: the chosen or recognised family
        model: configuration of a preset, used instead of the shapes of the tensors
        image_size: side of the input in pixels, or None for the checkpoint's
        context_length: longest text in tokens, or None for the checkpoint's
        activation: gelu or quick_gelu, or None for the family's
    """

    family: str
    model: ModelConfig | None = None
    image_size: int | None = None
    context_length: int | None = None
    activation: str | None = None


@dataclass
class Converted:
    """A converted model, ready to be written.

    Args:
        config: its architecture
        state: all its tensors
        unused: names in the checkpoint that it does not need
        tokenizer: tokenizer of its text encoder: ``clip``, a hub id, the checkpoint's folder, or NOT_NAMED
        notes: messages for the user
    """

    config: ModelConfig
    state: State
    unused: list[str]
    tokenizer: str
    notes: list[str] = field(default_factory=list)


def assemble(
    checkpoint: Checkpoint, config: ModelConfig, rules: list[Rule], given: State, tokenizer: str, notes: list[str]
) -> Converted:
    """Builds the model on the meta device and makes its tensors from those of the checkpoint."""
    with without_memory():
        model = build_model(config)
    state, unused = fill(model.state_dict(), rules, checkpoint.state, checkpoint.source, given)
    return Converted(model.config, state, unused, tokenizer, notes)


def clip_vit(
    width: int, layers: int, patch: int, image_size: int, activation: str, heads: int | None = None
) -> EncoderConfig:
    """Returns timm's name and arguments for a ViT of CLIP with these sizes; ``heads`` None are those of CLIP's."""
    quick = "quickgelu_" if activation == "quick_gelu" else ""
    name = f"vit_{SIZES.get((width, layers), 'base')}_patch{patch}_clip_{quick}224"
    kwargs: dict[str, int | str] = {}
    if (width, layers) not in SIZES or not timm.is_model(name):
        name = f"vit_base_patch32_clip_{quick}224"
        kwargs = {"embed_dim": width, "depth": layers, "num_heads": heads or vision_heads(width), "patch_size": patch}
    elif heads not in (None, vision_heads(width)):
        kwargs = {"num_heads": heads}
    return EncoderConfig(name=name, image_size=image_size, mean=list(CLIP_MEAN), std=list(CLIP_STD), kwargs=kwargs)


def vision_heads(width: int) -> int:
    return max(1, width // HEAD_WIDTHS.get(width, 64))


def vision_heads_of(vision: EncoderConfig) -> int:
    """Returns the heads of a ViT from `clip_vit`."""
    if "num_heads" in vision.kwargs:
        return int(vision.kwargs["num_heads"])
    width = next(width for (width, _), size in SIZES.items() if f"vit_{size}_" in vision.name)
    return vision_heads(width)


def clip_text(
    vocabulary: int, width: int, inner: int, layers: int, positions: int, activation: str, context_length: int | None
) -> TextConfig:
    """Returns the configuration of CLIP's text tower with these sizes for transformers."""
    length = context_length or positions
    config = {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // TEXT_HEAD_WIDTH),
        "max_position_embeddings": length,
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    return TextConfig(config=config, context_length=length, pooling="eos")


def describe_facts(config: ModelConfig, activation: str, file: str, known: bool) -> str:
    """Returns a line about what the tensors do not tell: read from the file beside the weights, or assumed."""
    heads = vision_heads_of(config.vision), (config.text.config or {})["num_attention_heads"]
    found = f"activation {activation}, {heads[0]} heads in the visual tower and {heads[1]} in the text tower"
    if known:
        return f"{found}: from {file}"
    return (
        f"{found}: assumed, because the keys do not tell and there is no {file} beside the weights (--activation and "
        "--preset change it)"
    )


def missing_blocks(config: ModelConfig) -> list[str]:
    """Names towers that are as wide as a published one but have fewer blocks: the file may have been cut at its end."""
    vision, text = config.vision.kwargs, config.text.config or {}
    towers = (
        ("visual", vision.get("embed_dim"), vision.get("depth", 0), VISION_BLOCKS),
        ("text", text.get("hidden_size"), text.get("num_hidden_layers", 0), TEXT_BLOCKS),
    )
    return [
        f"blocks {found} to {published[width] - 1} of the {name} tower, which has {published[width]} at width {width}"
        for name, width, found, published in towers
        if width in published and found < published[width]
    ]


def count_blocks(state: State, prefix: str) -> int:
    """Returns the number of blocks under the prefix."""
    numbers = [name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isascii() and number.isdigit()), default=-1)


def attribution_scale(config: ModelConfig) -> State:
    """Returns the starting scale of the attribution loss, which CLIP checkpoints do not have."""
    return {"attribution_scale": torch.tensor([config.attribution_scale_init]).log()}


def require_tensor(state: State, name: str, source: str) -> torch.Tensor:
    """Returns a tensor of the checkpoint. Raises ValueError that names it if it is missing."""
    if name not in state:
        raise ValueError(f"{source} does not hold the expected model: missing: {name}")
    return state[name]


def read_fact(facts: Mapping[str, Any], *names: str) -> Any:
    """Returns a number, boolean or text of the facts beside a checkpoint, or None if it is missing or unsuitable."""
    value: Any = facts
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    is_count = isinstance(value, int) and 0 <= value <= 1 << 20
    return value if is_count or isinstance(value, str) or (isinstance(value, float) and 0 <= value < 1) else None
