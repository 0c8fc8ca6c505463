"""The authors' PriorCLIP release (github.com/jaychempan/PIR-CLIP): open_clip's layout with a prior beside it.

    res_visual.*         CLIP's ModifiedResNet-50 with attention pooling, projected to 512: the prior
    vision_proj_res.*    512 -> 768: the instruction
    visual.*, transformer.*, ...    CLIP ViT-B/32, GELU

Belief is computed as in their code (``compat: released``), by the last version of their repository (9554baf). The two
versions before it (20bbe30, 4503ff8) weighted the tokens by twice M, without the ranks, and normalised. Neither the
checkpoints nor the repository tell which version made the weights.
"""

from __future__ import annotations

import math

from priorclip.model.config import BeliefConfig, EncoderConfig
from priorclip.model.convert import open_clip
from priorclip.model.convert.checkpoint import OPEN_CLIP_CONFIG, Checkpoint
from priorclip.model.convert.family import (
    CLIP_MEAN,
    CLIP_STD,
    Converted,
    Request,
    assemble,
    attribution_scale,
    describe_facts,
    require_tensor,
)
from priorclip.model.convert.rules import Rule
from priorclip.model.encoders.weights import State

PRIOR = r"prior\.model\."
STRIDE = 32


def recognises(state: State) -> bool:
    return "res_visual.conv1.weight" in state and "vision_proj_res.weight" in state


def convert(checkpoint: Checkpoint, request: Request) -> Converted:
    """Converts to a PriorCLIP with the released belief."""
    state, source = checkpoint.state, checkpoint.source
    activation = request.activation or "gelu"
    if request.model is not None:
        config = request.model
    else:
        config = open_clip.architecture(checkpoint, request, activation)
        config.prior = prior_config(state, source)
        config.belief = BeliefConfig(mode="soft", compat="released")
    config.kind = "priorclip"
    rules = [
        *prior_rules(),
        Rule(r"visual\.instruction\.(.*)", r"vision_proj_res.\1"),
        *open_clip.vision_rules(),
        *open_clip.text_rules(open_clip.text_prefix(state)),
        open_clip.scale_rule(),
    ]
    notes = [] if request.model else [describe_facts(config, activation, OPEN_CLIP_CONFIG, False)]
    return assemble(checkpoint, config, rules, attribution_scale(config), "clip", notes)


def prior_config(state: State, source: str) -> EncoderConfig:
    """Returns the prior by the shapes of the tensors, at the image size of its training."""
    side = math.isqrt(require_tensor(state, "res_visual.attnpool.positional_embedding", source).shape[0] - 1) * STRIDE
    return EncoderConfig(
        name="resnet50_clip.openai",
        image_size=side,
        trainable=False,
        mean=list(CLIP_MEAN),
        std=list(CLIP_STD),
        projection=require_tensor(state, "res_visual.attnpool.c_proj.weight", source).shape[0],
    )


def prior_rules() -> list[Rule]:
    """Rules for timm's ByobNet and CLIP's ModifiedResNet; timm counts stages from 0, CLIP from 1."""
    rules = [
        Rule(PRIOR + r"stem\.conv([123])\.conv\.weight", r"res_visual.conv\1.weight"),
        Rule(PRIOR + r"stem\.conv([123])\.bn\.(.*)", r"res_visual.bn\1.\2"),
        Rule(PRIOR + r"head\.pos_embed", "res_visual.attnpool.positional_embedding"),
        Rule(PRIOR + r"head\.([qkv])\.(.*)", r"res_visual.attnpool.\1_proj.\2"),
        Rule(PRIOR + r"head\.proj\.(.*)", r"res_visual.attnpool.c_proj.\1"),
    ]
    for stage in range(4):
        ours, theirs = PRIOR + rf"stages\.{stage}\.(\d+)\.", rf"res_visual.layer{stage + 1}.\1."
        rules += [
            Rule(ours + r"conv([123])_(?:1x1|kxk)\.conv\.weight", theirs + r"conv\2.weight"),
            Rule(ours + r"conv([123])_(?:1x1|kxk)\.bn\.(.*)", theirs + r"bn\2.\3"),
            Rule(ours + r"shortcut\.conv\.conv\.weight", theirs + r"downsample.0.weight"),
            Rule(ours + r"shortcut\.conv\.bn\.(.*)", theirs + r"downsample.1.\2"),
        ]
    return rules
