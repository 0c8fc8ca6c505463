"""CLIP with transformers' names (``CLIPModel``): a folder of transformers, or a state dict alone.

The config.json of a folder tells the activation of the layers; a state dict alone is taken as OpenAI's (QuickGELU).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    describe_facts,
    read_fact,
    require_tensor,
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
    """Converts to a plain CLIP."""
    hidden_act = read_fact(checkpoint.facts, "vision_config", "hidden_act")
    known = hidden_act or ("quick_gelu" if not checkpoint.facts.get("vision_config") else None)
    activation = request.activation or known or "quick_gelu"
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"{checkpoint.source}: hidden_act is '{activation}', but only gelu and quick_gelu are known")
    config = request.model or architecture(checkpoint, request, activation)
    config.kind = "clip"
    described = all(isinstance(checkpoint.facts.get(part), Mapping) for part in ("vision_config", "text_config"))
    notes = [] if request.model else [describe_facts(config, activation, "config.json", described)]
    return assemble(checkpoint, config, rules(), attribution_scale(config), "clip", notes)


def architecture(checkpoint: Checkpoint, request: Request, activation: str) -> ModelConfig:
    """Returns the configuration by the shapes of the tensors."""
    state, source = checkpoint.state, checkpoint.source
    patches = require_tensor(state, f"{THEIRS}embeddings.patch_embedding.weight", source)
    width, patch = patches.shape[0], patches.shape[-1]
    side = (
        math.isqrt(require_tensor(state, f"{THEIRS}embeddings.position_embedding.weight", source).shape[0] - 1) * patch
    )
    vocabulary, text_width = require_tensor(state, "text_model.embeddings.token_embedding.weight", source).shape
    text = clip_text(
        vocabulary,
        text_width,
        require_tensor(state, "text_model.encoder.layers.0.mlp.fc1.weight", source).shape[0],
        count_blocks(state, "text_model.encoder.layers."),
        require_tensor(state, "text_model.embeddings.position_embedding.weight", source).shape[0],
        activation,
        request.context_length,
    )
    vision = clip_vit(width, count_blocks(state, LAYERS), patch, request.image_size or side, activation)
    check_heads(checkpoint, vision.kwargs.get("num_heads", width // 64 if width != 1280 else 16), text.config or {})
    return ModelConfig(
        kind="clip",
        embed_dim=require_tensor(state, "visual_projection.weight", source).shape[0],
        vision=vision,
        text=text,
    )


def check_heads(checkpoint: Checkpoint, vision_heads: int, text: dict[str, int]) -> None:
    """Sets the heads of the text tower from config.json. Raises ValueError if the visual tower's differ from CLIP's."""
    heads = read_fact(checkpoint.facts, "vision_config", "num_attention_heads")
    if heads is not None and heads != vision_heads:
        raise ValueError(f"{checkpoint.source}: {heads} attention heads in the visual tower; CLIP's has {vision_heads}")
    text_heads = read_fact(checkpoint.facts, "text_config", "num_attention_heads")
    text["num_attention_heads"] = int(text_heads or text["num_attention_heads"])


def rules() -> list[Rule]:
    """Rules for timm's ViT; the text tower has transformers' names."""
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
