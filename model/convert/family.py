"""What a family of checkpoints says of itself: the model that its tensors make, and what each tensor is called.

A family is a module of this package with `recognises(state)` and `convert(checkpoint, request)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import timm
import torch

from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig, ModelConfig, TextConfig
from priorclip.model.convert.checkpoint import Checkpoint
from priorclip.model.convert.rules import Rule, fill
from priorclip.model.encoders.weights import State

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
SIZES = {  # width, layers -> the name that timm and the papers give to a ViT of CLIP
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
    (1664, 48): "gigantic",
}
VISION_BLOCKS = dict(SIZES.keys())  # width -> blocks of the published towers
TEXT_BLOCKS = {512: 12, 768: 12, 1024: 24, 1280: 32}
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # all others: 64
TEXT_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Request:
    """What the user asked for beyond the checkpoint itself.

    Args:
        family: the name that was chosen or recognised
        model: a preset's configuration that is to be taken instead of what the shapes say
        image_size: side of the input in pixels, or None for the checkpoint's
        context_length: longest text, or None for the checkpoint's
        activation: gelu or quick_gelu, or None for the family's
    """

    family: str
    model: ModelConfig | None = None
    image_size: int | None = None
    context_length: int | None = None
    activation: str | None = None


@dataclass
class Converted:
    """A model of ours, ready to be written.

    Args:
        config: its architecture
        state: all its tensors
        unused: names in the checkpoint that it does not need
        tokenizer: which tokenizer its text encoder was trained with: ``clip``, or a hub id
        notes: what the user should know
    """

    config: ModelConfig
    state: State
    unused: list[str]
    tokenizer: str
    notes: list[str] = field(default_factory=list)


def assemble(
    checkpoint: Checkpoint, config: ModelConfig, rules: list[Rule], given: State, tokenizer: str, notes: list[str]
) -> Converted:
    """Build the model without memory, and make each of its tensors of the checkpoint's."""
    with torch.device("meta"):
        model = build_model(config)
    state, unused = fill(model.state_dict(), rules, checkpoint.state, checkpoint.source, given)
    return Converted(model.config, state, unused, tokenizer, notes)


def clip_vit(width: int, layers: int, patch: int, image_size: int, activation: str) -> EncoderConfig:
    """timm's name and arguments for a ViT of CLIP of these sizes."""
    quick = "quickgelu_" if activation == "quick_gelu" else ""
    name = f"vit_{SIZES.get((width, layers), 'base')}_patch{patch}_clip_{quick}224"
    kwargs: dict[str, int | str] = {}
    if (width, layers) not in SIZES or not timm.is_model(name):
        name = f"vit_base_patch32_clip_{quick}224"
        kwargs = {"embed_dim": width, "depth": layers, "num_heads": vision_heads(width), "patch_size": patch}
    return EncoderConfig(name=name, image_size=image_size, mean=list(CLIP_MEAN), std=list(CLIP_STD), kwargs=kwargs)


def vision_heads(width: int) -> int:
    return max(1, width // HEAD_WIDTHS.get(width, 64))


def clip_text(
    vocabulary: int, width: int, inner: int, layers: int, positions: int, activation: str, context_length: int | None
) -> TextConfig:
    """The text tower of CLIP of these sizes, as transformers describes it."""
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


def lacking_blocks(config: ModelConfig) -> list[str]:
    """Towers as wide as a published one that are shorter: a file that was cut at its end looks like that."""
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


def blocks(state: State, prefix: str) -> int:
    """How many blocks stand under the prefix."""
    numbers = [name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def attribution_scale(config: ModelConfig) -> State:
    """The scale of the attribution loss, which CLIP does not have: as a new model starts."""
    return {"attribution_scale": torch.tensor([config.attribution_scale_init]).log()}


def need(state: State, name: str, source: str) -> torch.Tensor:
    """A tensor whose shape says what the model is. ValueError that names it where it is not there."""
    if name not in state:
        raise ValueError(f"{source} does not hold the model that it should: missing: {name}")
    return state[name]
