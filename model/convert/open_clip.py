"""CLIP with the names of OpenAI and open_clip: OpenAI, open_clip, RemoteCLIP and GeoRSCLIP.

    visual.conv1.weight, visual.transformer.resblocks.0.attn.in_proj_weight, transformer.resblocks.0..., text_projection

The keys do not tell the activation of the layers, but the family does. QuickGELU: OpenAI's weights, and GeoRSCLIP's
that were tuned from them (all but ViT-H/14). GELU: open_clip's own weights, and the code of RemoteCLIP's authors.
"""

from __future__ import annotations

import math

from priorclip.model.config import ModelConfig
from priorclip.model.convert.checkpoint import Checkpoint
from priorclip.model.convert.family import (
    Converted,
    Request,
    assemble,
    attribution_scale,
    clip_text,
    clip_vit,
    count_blocks,
    require_tensor,
)
from priorclip.model.convert.positions import first_positions, resampled
from priorclip.model.convert.rules import Rule, one_of_three, transposed, whole
from priorclip.model.encoders.weights import State

OURS = r"visual\.encoder\.model\."
LAYER = r"text\.model\.(?:text_model\.)?encoder\.layers\.(\d+)\."
TEXT = r"text\.model\.(?:text_model\.)?"
HUGE = 1280


def recognises(state: State) -> bool:
    return (
        "visual.conv1.weight" in state and "visual.class_embedding" in state and "res_visual.conv1.weight" not in state
    )


def convert(checkpoint: Checkpoint, request: Request) -> Converted:
    """Converts to a plain CLIP."""
    state, source = checkpoint.state, checkpoint.source
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"{source} has a ResNet as its visual tower; only ViTs of open_clip's layout are converted")
    activation = request.activation or family_activation(
        request.family, require_tensor(state, "visual.conv1.weight", source).shape[0]
    )
    config = request.model or architecture(checkpoint, request, activation)
    config.kind = "clip"
    rules = [*vision_rules(), *text_rules(text_prefix(state)), scale_rule()]
    notes = [] if request.model else [f"activation {activation} (change it by --activation; the keys do not tell)"]
    return assemble(checkpoint, config, rules, attribution_scale(config), "clip", notes)


def family_activation(family: str, width: int) -> str:
    if family == "openai" or (family == "georsclip" and width != HUGE):
        return "quick_gelu"
    return "gelu"


def architecture(checkpoint: Checkpoint, request: Request, activation: str) -> ModelConfig:
    """Returns the configuration by the shapes of the tensors."""
    state, source = checkpoint.state, checkpoint.source
    patches = require_tensor(state, "visual.conv1.weight", source)
    width, patch = patches.shape[0], patches.shape[-1]
    side = math.isqrt(require_tensor(state, "visual.positional_embedding", source).shape[0] - 1) * patch
    vision = clip_vit(
        width, count_blocks(state, "visual.transformer.resblocks."), patch, request.image_size or side, activation
    )
    prefix = text_prefix(state)
    vocabulary, text_width = require_tensor(state, f"{prefix}token_embedding.weight", source).shape
    text = clip_text(
        vocabulary,
        text_width,
        require_tensor(state, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", source).shape[0],
        count_blocks(state, f"{prefix}transformer.resblocks."),
        require_tensor(state, f"{prefix}positional_embedding", source).shape[0],
        activation,
        request.context_length,
    )
    return ModelConfig(
        kind="clip", embed_dim=require_tensor(state, "visual.proj", source).shape[1], vision=vision, text=text
    )


def text_prefix(state: State) -> str:
    """Returns the prefix of the text tower: newer models of open_clip have ``text.``."""
    return "text." if "text.token_embedding.weight" in state else ""


def vision_rules() -> list[Rule]:
    """Rules for timm's ViT and the projection."""
    block = OURS + r"blocks\.(\d+)\."
    theirs = r"visual.transformer.resblocks.\1."
    return [
        Rule(OURS + r"cls_token", "visual.class_embedding"),
        Rule(OURS + r"pos_embed", "visual.positional_embedding", resampled),
        Rule(OURS + r"patch_embed\.proj\.weight", "visual.conv1.weight"),
        Rule(OURS + r"norm_pre\.(.*)", r"visual.ln_pre.\1"),
        Rule(OURS + r"norm\.(.*)", r"visual.ln_post.\1"),
        Rule(block + r"norm([12])\.(.*)", theirs + r"ln_\2.\3"),
        Rule(block + r"attn\.qkv\.(.*)", theirs + r"attn.in_proj_\2"),
        Rule(block + r"attn\.proj\.(.*)", theirs + r"attn.out_proj.\2"),
        Rule(block + r"mlp\.fc1\.(.*)", theirs + r"mlp.c_fc.\2"),
        Rule(block + r"mlp\.fc2\.(.*)", theirs + r"mlp.c_proj.\2"),
        Rule(r"image_projection\.weight", "visual.proj", transposed),
    ]


def text_rules(prefix: str = "") -> list[Rule]:
    """Rules for transformers' CLIP text tower and the projection."""
    theirs = prefix + r"transformer.resblocks.\1."
    parts = [
        Rule(LAYER + rf"self_attn\.{name}_proj\.(.*)", theirs + r"attn.in_proj_\2", one_of_three(place))
        for place, name in enumerate("qkv")
    ]
    return [
        Rule(TEXT + r"embeddings\.token_embedding\.weight", f"{prefix}token_embedding.weight"),
        Rule(TEXT + r"embeddings\.position_embedding\.weight", f"{prefix}positional_embedding", first_positions),
        *parts,
        Rule(LAYER + r"self_attn\.out_proj\.(.*)", theirs + r"attn.out_proj.\2"),
        Rule(LAYER + r"layer_norm([12])\.(.*)", theirs + r"ln_\2.\3"),
        Rule(LAYER + r"mlp\.fc1\.(.*)", theirs + r"mlp.c_fc.\2"),
        Rule(LAYER + r"mlp\.fc2\.(.*)", theirs + r"mlp.c_proj.\2"),
        Rule(TEXT + r"final_layer_norm\.(.*)", prefix + r"ln_final.\1"),
        Rule(r"text_projection\.weight", f"{prefix}text_projection", transposed),
    ]


def scale_rule() -> Rule:
    return Rule(r"logit_scale", "logit_scale", whole)
