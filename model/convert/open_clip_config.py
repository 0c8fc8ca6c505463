"""open_clip_config.json beside a checkpoint: what the names and shapes of its tensors do not tell.

    {"model_cfg": {"embed_dim": 512, "quick_gelu": true, "vision_cfg": {"width": 768, "head_width": 64, ...},
                   "text_cfg": {"width": 512, "heads": 8, "vocab_size": 49408, ...}},
     "preprocess_cfg": {"mean": [...], "std": [...]}}

    facts = read_open_clip_config(checkpoint)       # None without the file
    facts.vision_heads, facts.text_heads, facts.activation

A value that would make another model than ours is an error that names its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from priorclip.common.output import get_logger
from priorclip.model.convert.checkpoint import OPEN_CLIP_CONFIG, Checkpoint
from priorclip.model.encoders.weights import State

log = get_logger(__name__)

HEAD_WIDTH, HEADS, MAX_HEADS = 64, 8, 1024  # the first two are open_clip's defaults
# The only value of each key for which our towers compute the same.
VISION = {
    "timm_model_name": None, "attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable",
    "final_ln_after_pool": False, "pool_type": "tok", "ls_init_value": None, "act_kwargs": None, "norm_kwargs": None,
    "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False,
}  # fmt: skip
TEXT = {
    "hf_model_name": None, "embed_cls": False, "no_causal_mask": False, "final_ln_after_pool": False,
    "ls_init_value": None, "proj_bias": False, "proj_type": "linear", "act_kwargs": None, "norm_kwargs": None,
    "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False,
}  # fmt: skip
PREPROCESS = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
END_POOLING = ("argmax", "eos")


@dataclass(frozen=True)
class OpenClipFacts:
    """Args:
    vision_heads: attention heads of the visual tower
    text_heads: attention heads of the text tower
    activation: gelu or quick_gelu
    mean, std: of the input, three numbers each, or None
    end_id: token id at the end of a text; None for the largest id of the vocabulary
    tokenizer: name of a tokenizer of transformers that is not CLIP's, or None
    """

    vision_heads: int
    text_heads: int
    activation: str
    mean: list[float] | None
    std: list[float] | None
    end_id: int | None
    tokenizer: str | None


def read_open_clip_config(checkpoint: Checkpoint, state: State, prefix: str) -> OpenClipFacts | None:
    """Returns the facts of the file beside the weights, or None if there is none.

    Args:
        checkpoint: its ``facts`` hold the file's content
        state: its tensors, for comparison
        prefix: of the text tower's names
    Raises:
        ValueError: the file is of another model, or of one that we do not have; names the key
    """
    content = checkpoint.facts.get(OPEN_CLIP_CONFIG)
    if content is None:
        return None
    model = section(content, "model_cfg", checkpoint.source)
    vision, text = (section(model, name, checkpoint.source) for name in ("vision_cfg", "text_cfg"))
    refuse_others("vision_cfg", vision, VISION, checkpoint.source)
    refuse_others("text_cfg", text, TEXT, checkpoint.source)
    pooling = text.get("pool_type", "argmax")
    if pooling not in END_POOLING:
        refuse("text_cfg.pool_type", pooling, checkpoint.source)
    preprocess = content.get("preprocess_cfg") or {}
    preprocess = preprocess if isinstance(preprocess, Mapping) else {}
    other = {key: preprocess[key] for key, value in PREPROCESS.items() if preprocess.get(key, value) != value}
    if other:
        log.warning(
            "%s beside %s prepares images by %s; we do by %s", OPEN_CLIP_CONFIG, checkpoint.source, other, PREPROCESS
        )
    width, text_width = state["visual.conv1.weight"].shape[0], state[f"{prefix}token_embedding.weight"].shape[1]
    for key, found, expected in (
        ("vision_cfg.width", vision.get("width", 768), width),
        ("text_cfg.width", text.get("width", 512), text_width),
    ):
        if found != expected:
            raise ValueError(
                f"{OPEN_CLIP_CONFIG} beside {checkpoint.source} is of another model: {key} is {found!r:.40}, and the "
                f"weights have {expected}: move the file away, or put the right one there"
            )
    head_width = count(vision.get("head_width", HEAD_WIDTH), "vision_cfg.head_width", width, checkpoint.source)
    heads = count(text.get("heads", HEADS), "text_cfg.heads", text_width, checkpoint.source)
    quick = bool(model.get("quick_gelu", False))
    tokenizer = text.get("hf_tokenizer_name")
    return OpenClipFacts(
        width // head_width,
        heads,
        "quick_gelu" if quick else "gelu",
        three(preprocess.get("mean")),
        three(preprocess.get("std")),
        text.get("eos_id", 2) if pooling == "eos" else None,
        tokenizer if isinstance(tokenizer, str) and tokenizer else None,
    )


def section(values: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    found = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"{OPEN_CLIP_CONFIG} beside {source} has no object '{name}'")
    return found


def refuse_others(part: str, values: Mapping[str, Any], known: Mapping[str, Any], source: str) -> None:
    for key, value in known.items():
        if values.get(key, value) != value and (values[key] or value):
            refuse(f"{part}.{key}", values[key], source)


def refuse(key: str, value: Any, source: str) -> None:
    raise ValueError(f"{OPEN_CLIP_CONFIG} beside {source}: {key} is {value!r:.60}; such a model is not converted")


def count(value: Any, key: str, width: int, source: str) -> int:
    """Returns a number that divides the width. Raises ValueError that names the key."""
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not 1 <= value <= max(width, MAX_HEADS)
        or width % value
    ):
        raise ValueError(f"{OPEN_CLIP_CONFIG} beside {source}: {key} is {value!r:.40}, which does not divide {width}")
    return value


def three(value: Any) -> list[float] | None:
    fits = isinstance(value, list) and len(value) == 3 and all(isinstance(each, int | float) for each in value)
    return [float(each) for each in value] if fits else None
