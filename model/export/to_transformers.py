"""A model for transformers alone, in a process that does not know this project.

    FOLDER/config.json, model.safetensors, preprocessor_config.json, tokenizer files
           modelling_priorclip.py      only for models that transformers does not know

A plain CLIP with CLIP's own towers becomes a ``CLIPModel``, which transformers, its pipelines and sentence-transformers
load without any code from the folder. Every other model becomes an export folder whose config.json names the model
class in the file beside it (``auto_map``), for ``trust_remote_code=True``. This project loads that folder too, as data,
and never runs the file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from priorclip.common.files import folder_aside
from priorclip.common.output import get_logger
from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.model.convert.rules import stacked, their_names
from priorclip.model.convert.transformers_clip import rules
from priorclip.model.encoders.weights import State
from priorclip.model.export import modelling_priorclip
from priorclip.model.export.folder import preprocessor, refuse_bands, save_pretrained, set_tokenizer_length, write_json
from priorclip.model.export.to_open_clip import read_text_ids
from priorclip.model.export_config import AUTO_MAP
from priorclip.model.networks.uncertainty import means_only
from priorclip.model.without_memory import without_memory

log = get_logger(__name__)

CODE = Path(modelling_priorclip.__file__)
OUR_OWN = ("logit_bias", "attribution_scale")  # not in a CLIPModel
OLD_END = 2  # for an end token with this id transformers takes the largest id of a text as its end


def export_transformers(model: Any, folder: str | Path, source: str | Path) -> str:
    """Writes the folder, replaces an existing one, and returns what it is.

    Args:
        model: with two towers
        folder: output folder
        source: export folder of the model, whose tokenizer is copied
    Raises:
        ValueError: the model has a part that the folder cannot hold
    """
    refuse_bands(model.config, "transformers")
    model = means_only(model)
    source, folder = Path(source), Path(folder)
    config = clip_config(model, source)
    if config is None:
        write_with_code(model, folder, source)
        return f"{folder}: for AutoModel.from_pretrained(folder, trust_remote_code=True)"
    with without_memory():
        clip = CLIPModel(config)
    clip.load_state_dict(clip_state(model), strict=True, assign=True)
    values = preprocessor(model.config) | {"do_normalize": True}
    tokenizer = read_tokenizer(model, source)
    with folder_aside(folder) as aside:
        clip.save_pretrained(str(aside))
        CLIPProcessor(CLIPImageProcessor(**values), tokenizer).save_pretrained(str(aside))
    return f"{folder}: a CLIPModel of transformers"


def read_tokenizer(model: Any, source: Path) -> Any:
    """Returns the tokenizer of the export folder, which cuts texts where the model's texts end."""
    tokenizer = open_tokenizer(str(source))
    set_tokenizer_length(tokenizer, model.config.text.context_length)
    return tokenizer


def clip_config(model: Any, source: Path) -> CLIPConfig | None:
    """Returns the configuration of the ``CLIPModel`` that computes the same, or None if there is none."""
    text = model.config.text.config
    if model.config.kind != "clip" or "_clip_" not in model.config.vision.name:
        return None
    vit = model.visual.encoder.model
    if not hasattr(vit, "blocks"):  # a ResNet of CLIP
        return None
    if text.get("model_type") != "clip_text_model" or model.config.text.pooling != "eos":
        return None
    end = read_text_ids(source, text).settings.get("eos_id", text.get("eos_token_id"))
    if end == OLD_END:
        log.info("the end of a text has the id %d, which a CLIPModel reads in another way", OLD_END)
        return None
    return CLIPConfig(
        projection_dim=model.config.embed_dim,
        logit_scale_init_value=float(model.logit_scale.detach()),
        text_config={**text, "eos_token_id": end, "projection_dim": model.config.embed_dim},
        vision_config={
            "hidden_size": vit.embed_dim,
            "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
            "num_hidden_layers": len(vit.blocks),
            "num_attention_heads": vit.blocks[0].attn.num_heads,
            "image_size": model.config.vision.image_size,
            "patch_size": vit.patch_embed.patch_size[0],
            "hidden_act": "quick_gelu" if "quickgelu" in model.config.vision.name else "gelu",
            "layer_norm_eps": vit.norm.eps,
            "projection_dim": model.config.embed_dim,
        },
    )


def clip_state(model: Any) -> State:
    """Returns the tensors by the names of ``CLIPModel``: the conversion rules in reverse."""
    made: State = {}
    for name, value in model.state_dict().items():
        if name in OUR_OWN:
            continue
        names, take = their_names(name, rules())
        parts = value.chunk(len(names)) if take is stacked else [value]
        made |= {theirs: reshaped(theirs, part).contiguous().clone() for theirs, part in zip(names, parts, strict=True)}
    return made


def reshaped(theirs: str, value: Tensor) -> Tensor:
    """Removes the axes of length 1 that their layout does not have."""
    if theirs.endswith(("class_embedding", "logit_scale")):
        return value.reshape(value.shape[-1:] if theirs.endswith("class_embedding") else ())
    return value[0] if theirs.endswith("position_embedding.weight") and value.ndim == 3 else value


def write_with_code(model: Any, folder: Path, source: Path) -> None:
    """Writes the export folder again, with the file of the model class. Raises ValueError for a belief it lacks."""
    mode = model.config.belief.mode
    if model.config.kind != "clip" and mode not in ("soft", "hard", "none"):
        raise ValueError(f"{source}: the file for transformers has soft, hard and no belief, not '{mode}'")
    if model.config.kind == "clip" and model.logit_bias is not None:
        log.info("the bias of the sigmoid loss is in the logits that the model returns")
    tokenizer, card = read_tokenizer(model, source), source / "README.md"
    with folder_aside(folder) as aside:
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        export = save_pretrained(model.state_dict(), model.config, aside / "export", source, card=text)
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))
        CLIPProcessor(CLIPImageProcessor(**preprocessor(model.config)), tokenizer).save_pretrained(str(aside))
        for path in export.iterdir():
            path.replace(aside / path.name)
        export.rmdir()
        write_json(aside / "config.json", {**config, "auto_map": AUTO_MAP})
        shutil.copyfile(CODE, aside / CODE.name)
