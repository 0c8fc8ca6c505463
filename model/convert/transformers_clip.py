"""CLIP by transformers' names (``CLIPModel``): a folder of its, or the state dict alone.

A folder's config.json says which activation the layers have; a state dict alone is taken for OpenAI's (QuickGELU).
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
    blocks,
    clip_text,
    clip_vit,
    need,
)
from priorclip.model.convert.positions import first_positions, resampled
from priorclip.model.convert.rules import Rule, stacked
from priorclip.model.encoders.weights import State

OURS = r"visual\.encoder\.model\."
THEIRS = "vision_model."
LAYERS = "vision_model.encoder.layers."


def recognises(state: State) -> bool:
    return "vision_model.embeddings.class_embedding" in state and "text_projection.weight" in state


def convert(checkpoint: Checkpoint, request: Request) -> Converted:
    """A plain CLIP."""
    told = checkpoint.facts.get("vision_config", {}).get("hidden_act")
    known = told or ("quick_gelu" if not checkpoint.facts.get("vision_config") else None)
    activation = request.activation or known or "quick_gelu"
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"{checkpoint.source}: hidden_act '{activation}'; gelu and quick_gelu are known")
    config = request.model or architecture(checkpoint, request, activation)
    config.kind = "clip"
    notes = [] if request.model else [f"activation {activation}"]
    return assemble(checkpoint, config, rules(), attribution_scale(config), "clip", notes)


def architecture(checkpoint: Checkpoint, request: Request, activation: str) -> ModelConfig:
    """The configuration that the shapes tell."""
    state, source = checkpoint.state, checkpoint.source
    patches = need(state, f"{THEIRS}embeddings.patch_embedding.weight", source)
    width, patch = patches.shape[0], patches.shape[-1]
    side = math.isqrt(need(state, f"{THEIRS}embeddings.position_embedding.weight", source).shape[0] - 1) * patch
    vocabulary, text_width = need(state, "text_model.embeddings.token_embedding.weight", source).shape
    text = clip_text(
        vocabulary,
        text_width,
        need(state, "text_model.encoder.layers.0.mlp.fc1.weight", source).shape[0],
        blocks(state, "text_model.encoder.layers."),
        need(state, "text_model.embeddings.position_embedding.weight", source).shape[0],
        activation,
        request.context_length,
    )
    vision = clip_vit(width, blocks(state, LAYERS), patch, request.image_size or side, activation)
    check_heads(checkpoint, vision.kwargs.get("num_heads", width // 64 if width != 1280 else 16), text.config or {})
    return ModelConfig(
        kind="clip", embed_dim=need(state, "visual_projection.weight", source).shape[0], vision=vision, text=text
    )


def check_heads(checkpoint: Checkpoint, vision_heads: int, text: dict[str, int]) -> None:
    """Take the heads of the text tower from config.json. ValueError where the visual tower's are none that CLIP has."""
    told = checkpoint.facts.get("vision_config", {}).get("num_attention_heads")
    if told is not None and told != vision_heads:
        raise ValueError(f"{checkpoint.source}: {told} attention heads in the visual tower; CLIP's has {vision_heads}")
    text["num_attention_heads"] = checkpoint.facts.get("text_config", {}).get(
        "num_attention_heads", text["num_attention_heads"]
    )


def rules() -> list[Rule]:
    """timm's ViT on transformers' names; the text tower is transformers' own."""
    block = OURS + r"blocks\.(\d+)\."
    theirs = LAYERS + r"\1."
    three = tuple(theirs + rf"self_attn.{name}_proj.\2" for name in "qkv")
    return [
        Rule(OURS + r"cls_token", f"{THEIRS}embeddings.class_embedding"),
        Rule(OURS + r"pos_embed", f"{THEIRS}embeddings.position_embedding.weight", resampled),
        Rule(OURS + r"patch_embed\.proj\.weight", f"{THEIRS}embeddings.patch_embedding.weight"),
        Rule(OURS + r"norm_pre\.(.*)", THEIRS + r"pre_layrnorm.\1"),
        Rule(OURS + r"norm\.(.*)", THEIRS + r"post_layernorm.\1"),
        Rule(block + r"norm([12])\.(.*)", theirs + r"layer_norm\2.\3"),
        Rule(block + r"attn\.qkv\.(.*)", three, stacked),
        Rule(block + r"attn\.proj\.(.*)", theirs + r"self_attn.out_proj.\2"),
        Rule(block + r"mlp\.(fc[12])\.(.*)", theirs + r"mlp.\2.\3"),
        Rule(r"image_projection\.weight", "visual_projection.weight"),
        Rule(
            r"text\.model\.(?:text_model\.)?embeddings\.position_embedding\.weight",
            "text_model.embeddings.position_embedding.weight",
            first_positions,
        ),
        Rule(r"text\.model\.(?:text_model\.)?(.*)", r"text_model.\1"),
        Rule(r"text_projection\.weight", "text_projection.weight"),
        Rule(r"logit_scale", "logit_scale"),
    ]
