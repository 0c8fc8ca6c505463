"""The CLIP part of a model in open_clip's format, like its folders on the hub.

    FOLDER/open_clip_model.safetensors    visual.*, transformer.*, ... by open_clip's names
           open_clip_config.json          sizes and preprocessing
           tokenizer files                if the text tower does not have CLIP's tokenizer

    open_clip.create_model_and_transforms("local-dir:FOLDER")
    open_clip.get_tokenizer("local-dir:FOLDER")

The image tower must be a ViT with CLIP's layout, and the text tower CLIP's. open_clip has no prior: a PriorCLIP is
written without it, so its image features, which depend on the prior's token, differ there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from priorclip.common.files import folder_aside
from priorclip.common.output import get_logger
from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.model.convert.clip_tokenizer import CLIP_ENTRIES
from priorclip.model.convert.open_clip import text_rules, vision_rules
from priorclip.model.convert.rules import Take, their_names, transposed
from priorclip.model.encoders.weights import State
from priorclip.model.export.folder import refuse_bands, set_tokenizer_length, write_json
from priorclip.model.networks.uncertainty import means_only

log = get_logger(__name__)

EPS = 1e-5
CLIP_IDS = [49406, 320, 1125, 539, 320, 49407]  # of "a photo of a"
# open_clip reads the tokenizer of a local folder there, whatever the name; on the hub it wants the hub id here.
TOKENIZER_HERE = "tokenizer-of-this-folder"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
LEFT_OUT = ("prior.", "visual.instruction.", "attribution_scale")


def export_open_clip(model: Any, folder: str | Path, source: str | Path) -> Path:
    """Writes the folder and replaces an existing one.

    Args:
        model: with CLIP's two towers
        folder: output folder
        source: export folder whose tokenizer is read
    Raises:
        ValueError: open_clip has no model for a part, or cannot find the end of the tokenizer's texts
    """
    refuse_bands(model.config, "open_clip")
    model = means_only(model)
    config = open_clip_config(model)
    words = read_text_ids(Path(source), model.config.text.config or {})
    config["model_cfg"]["text_cfg"] |= words.settings
    state = open_clip_state(model)
    length = model.config.text.context_length  # texts are cut there, also if the tower has more positions
    state["positional_embedding"] = state["positional_embedding"][:length].clone()
    folder = Path(folder)
    with folder_aside(folder) as aside:
        if words.tokenizer is not None:
            set_tokenizer_length(words.tokenizer, length)
            words.tokenizer.save_pretrained(str(aside))
        write_json(aside / "open_clip_config.json", config)
        save_file(state, aside / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class TextIds:
    """How open_clip gets the ids of a text and finds its end.

    Args:
        settings: keys of its text_cfg; none if its own tokenizer is right
        tokenizer: transformers' tokenizer to save beside the weights, or None
    """

    settings: dict[str, Any]
    tokenizer: Any = None


def read_text_ids(source: Path, text: Mapping[str, Any]) -> TextIds:
    """Returns what open_clip has to know about the tokenizer in ``source``.

    By itself open_clip takes CLIP's tokenizer, and the largest id of a text as its end. For another tokenizer the
    configuration names the folder's, and the id of the end.

    Args:
        source: export folder
        text: configuration of the text tower
    Raises:
        ValueError: texts have no end token that open_clip could find
    """
    size, end = text["vocab_size"], text.get("eos_token_id")
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        if size != CLIP_ENTRIES:
            log.warning(
                "%s has no tokenizer, and its text tower has %d entries, not the %d of CLIP's tokenizer, which "
                "open_clip takes: give open_clip's model token ids of your own",
                *(source, size, CLIP_ENTRIES),
            )
        largest = end is None or end == size - 1
        return TextIds({} if largest else {"pool_type": "eos", "eos_id": end})
    tokenizer = open_tokenizer(str(source))
    if is_clips(tokenizer) and size == CLIP_ENTRIES:
        return TextIds({})
    first, second = (tokenizer(words)["input_ids"] for words in ("a river", "forest"))
    if not first or first[-1] != second[-1] or first.index(first[-1]) != len(first) - 1:
        raise ValueError(
            f"the tokenizer in {source} puts no end token after a text, or uses it elsewhere too, so open_clip cannot "
            "find the state that stands for the text"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(first[-1])
    log.info("the tokenizer is not CLIP's: it is written beside the weights, and open_clip_config.json names it")
    return TextIds({"hf_tokenizer_name": TOKENIZER_HERE, "pool_type": "eos", "eos_id": first[-1]}, tokenizer)


def is_clips(tokenizer: Any) -> bool:
    """Tells whether a tokenizer of transformers gives CLIP's ids."""
    return len(tokenizer) == CLIP_ENTRIES and tokenizer("a photo of a")["input_ids"] == CLIP_IDS


def open_clip_state(model: Any) -> State:
    """Returns the towers' tensors by open_clip's names: the conversion rules in reverse."""
    rules = [*vision_rules(), *text_rules()]
    made: State = {name: getattr(model, name).detach().reshape(()).clone() for name in scalars(model)}
    parts: dict[str, list[Tensor]] = {}
    for name, value in model.state_dict().items():
        if name.startswith(LEFT_OUT) or name in scalars(model):
            continue
        (theirs,), take = their_names(name, rules)
        parts.setdefault(theirs, []).append(value)
        made[theirs] = reverse(theirs, parts[theirs], value, take)
    queries = {name for name, values in parts.items() if len(values) > 1}
    own = model.state_dict()
    for theirs in queries:
        made[theirs] = torch.cat([own[name] for name in stacked_names(own, theirs, rules)])
    return {name: value.detach().float().cpu().contiguous().clone() for name, value in made.items()}


def scalars(model: Any) -> list[str]:
    """Returns the names of the learned numbers, which open_clip keeps without a dimension."""
    return ["logit_scale"] + (["logit_bias"] if model.logit_bias is not None else [])


def reverse(theirs: str, values: list[Tensor], value: Tensor, take: Take) -> Tensor:
    """Converts our tensor to open_clip's layout."""
    if take is transposed:
        return value.T
    if theirs in ("visual.class_embedding", "visual.positional_embedding"):
        return value.reshape(value.shape[-1]) if theirs.endswith("class_embedding") else value[0]
    return value


def stacked_names(own: State, theirs: str, rules: list[Any]) -> list[str]:
    """Returns our names of queries, keys and values, in the order in which open_clip stacks them in one tensor."""
    names = [name for name in own if not name.startswith((*LEFT_OUT, "logit_"))]
    stacked = [name for name in names if their_names(name, rules)[0] == [theirs]]
    return sorted(stacked, key=lambda name: "qkv".index(name.split("self_attn.")[1][0]))


def open_clip_config(model: Any) -> dict[str, Any]:
    """Returns open_clip_config.json of the model. Raises ValueError if a tower is not CLIP's."""
    config, vit = model.config, getattr(getattr(model.visual, "encoder", None), "model", None)
    text = config.text.config or {}
    if vit is None or "_clip_" not in config.vision.name or not hasattr(vit, "blocks"):
        raise ValueError(f"open_clip's format holds ViTs of CLIP; the visual encoder is '{config.vision.name}'")
    if text.get("model_type") != "clip_text_model" or config.text.pooling != "eos":
        raise ValueError(f"open_clip's format holds CLIP's text tower; this one is '{text.get('model_type')}'")
    if config.kind != "clip":
        log.warning("open_clip has no prior: prior and instruction of the model are left out")
    width, quick = vit.embed_dim, "quickgelu" in config.vision.name
    if quick != (text.get("hidden_act", "quick_gelu") == "quick_gelu"):
        raise ValueError("open_clip's models have one activation in both towers; this model's differ")
    if text.get("layer_norm_eps", EPS) != EPS:
        raise ValueError(f"open_clip's text tower has layer_norm_eps {EPS}; this one has {text['layer_norm_eps']}")
    bias = {} if config.logit_bias_init is None else {"init_logit_bias": config.logit_bias_init}
    return {
        "model_cfg": {
            **bias,
            "embed_dim": config.embed_dim,
            "quick_gelu": quick,
            "vision_cfg": {
                "image_size": config.vision.image_size,
                "layers": len(vit.blocks),
                "width": width,
                "head_width": width // vit.blocks[0].attn.num_heads,
                "mlp_ratio": vit.blocks[0].mlp.fc1.out_features / width,
                "patch_size": vit.patch_embed.patch_size[0],
            },
            "text_cfg": {
                "context_length": config.text.context_length,
                "vocab_size": text["vocab_size"],
                "width": text["hidden_size"],
                "heads": text["num_attention_heads"],
                "layers": text["num_hidden_layers"],
                "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
            },
        },
        "preprocess_cfg": {"mean": config.vision.mean, "std": config.vision.std},
    }
