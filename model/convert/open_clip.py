"""CLIP with the names of OpenAI and open_clip: OpenAI, open_clip, RemoteCLIP and GeoRSCLIP.

    visual.conv1.weight, visual.transformer.resblocks.0.attn.in_proj_weight, transformer.resblocks.0..., text_projection

The keys do not tell the activation of the layers, but the family does. QuickGELU: OpenAI's weights, and GeoRSCLIP's
that were tuned from them (all but ViT-H/14). GELU: open_clip's own weights, and the code of RemoteCLIP's authors.
Neither do they tell the heads. A folder of open_clip has both in open_clip_config.json; otherwise a line says what was
assumed.
"""

from __future__ import annotations

import math
from pathlib import Path

from priorclip.model.config import ModelConfig
from priorclip.model.convert.checkpoint import OPEN_CLIP_CONFIG, Checkpoint
from priorclip.model.convert.family import (
    NOT_NAMED,
    Converted,
    Request,
    assemble,
    attribution_scale,
    clip_text,
    clip_vit,
    count_blocks,
    describe_facts,
    require_tensor,
)
from priorclip.model.convert.open_clip_config import OpenClipFacts, read_open_clip_config
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
    width = require_tensor(state, "visual.conv1.weight", source).shape[0]
    require_tensor(state, f"{text_prefix(state)}token_embedding.weight", source)
    facts = None if request.model else read_open_clip_config(checkpoint, state, text_prefix(state))
    known = facts.activation if facts else family_activation(request.family, width)
    activation = request.activation or known
    config = request.model or architecture(checkpoint, request, activation, facts)
    config.kind = "clip"
    config.logit_bias_init = float(state["logit_bias"]) if "logit_bias" in state else None
    rules = [*vision_rules(), *text_rules(text_prefix(state)), scale_rule()]
    notes = [] if request.model else [describe_facts(config, activation, OPEN_CLIP_CONFIG, facts is not None)]
    tokenizer = choose_tokenizer(checkpoint, config, facts)
    return assemble(checkpoint, config, rules, attribution_scale(config), tokenizer, notes)


def choose_tokenizer(checkpoint: Checkpoint, config: ModelConfig, facts: OpenClipFacts | None) -> str:
    """Returns ``clip``, the folder of the weights if the tokenizer is there, or NOT_NAMED.

    The name in the file is not loaded, because only the user names hub ids and folders.
    """
    if facts is None or facts.tokenizer is None:
        return "clip"
    folder = Path(checkpoint.source)
    folder = folder if folder.is_dir() else folder.parent
    return str(folder) if (folder / "tokenizer_config.json").is_file() else NOT_NAMED


def family_activation(family: str, width: int) -> str:
    if family == "openai" or (family == "georsclip" and width != HUGE):
        return "quick_gelu"
    return "gelu"


def architecture(
    checkpoint: Checkpoint, request: Request, activation: str, facts: OpenClipFacts | None = None
) -> ModelConfig:
    """Returns the configuration by the shapes of the tensors, and by open_clip_config.json if it is there."""
    state, source = checkpoint.state, checkpoint.source
    patches = require_tensor(state, "visual.conv1.weight", source)
    width, patch = patches.shape[0], patches.shape[-1]
    side = math.isqrt(require_tensor(state, "visual.positional_embedding", source).shape[0] - 1) * patch
    vision = clip_vit(
        width,
        count_blocks(state, "visual.transformer.resblocks."),
        patch,
        request.image_size or side,
        activation,
        facts.vision_heads if facts else None,
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
    assert text.config is not None
    if facts:
        text.config["num_attention_heads"] = facts.text_heads
        text.config["eos_token_id"] = vocabulary - 1 if facts.end_id is None else facts.end_id
        vision.mean, vision.std = facts.mean or vision.mean, facts.std or vision.std
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
    return Rule(r"(logit_scale|logit_bias)", r"\1", whole)
