"""Converts published checkpoints to export folders: read, recognise, rename, check, write.

python -m model convert --input RemoteCLIP-ViT-B-32.pt --output converted --format remoteclip
python -m retrieval evaluate --model converted --data dataset.json --images images

checkpoint.py   the file: safetensors, weights_only, or a TorchScript archive; nothing in it is executed
FAMILY.py       one for each family of checkpoints: recognises its names, builds the model of its shapes, has its rules
rules.py        fills our model by the rules; missing or misshapen tensors are errors, unused ones are listed
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from priorclip.common.output import get_logger
from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.model.commands import ConvertConfig
from priorclip.model.config import ModelConfig
from priorclip.model.convert import open_clip, pir, priorclip_release, transformers_clip
from priorclip.model.convert.checkpoint import Checkpoint, read_checkpoint
from priorclip.model.convert.clip_tokenizer import CLIP_ENTRIES, write_clip_tokenizer
from priorclip.model.convert.family import NOT_NAMED, Converted, Request, missing_blocks
from priorclip.model.export.folder import save_pretrained
from priorclip.model.presets import load_preset

log = get_logger(__name__)

FAMILIES: dict[str, ModuleType] = {
    "openai": open_clip,
    "remoteclip": open_clip,
    "georsclip": open_clip,
    "priorclip": priorclip_release,
    "pir": pir,
    "transformers": transformers_clip,
    "open_clip": open_clip,
}
RELEASES = ("openai", "remoteclip", "georsclip", "priorclip", "pir")  # models of published sizes


def convert(config: ConvertConfig) -> Converted:
    """Writes the export folder and returns its content.

    Raises:
        OSError: a file is missing
        ValueError: the checkpoint is of another family or lacks a tensor; the message names file and keys
    """
    checkpoint = read_checkpoint(config.input)
    family = recognise(checkpoint) if config.format == "auto" else config.format
    if not FAMILIES[family].recognises(checkpoint.state):
        found = ", ".join(sorted(checkpoint.state)[:4])
        raise ValueError(f"--input {config.input} is not of --format {family}: its keys are {found}, ... (try auto)")
    request = Request(family, preset(config), config.image_size, config.context_length, config.activation)
    converted: Converted = FAMILIES[family].convert(checkpoint, request)
    converted.notes.insert(0, f"format {family}")
    refuse_cut_towers(config, family, converted)
    text = converted.config.text
    if converted.tokenizer not in ("clip", NOT_NAMED) and not Path(converted.tokenizer).is_dir():
        text.name = converted.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(config, converted, Path(folder))
        facts = {"source": Path(config.input).name, "format": family}
        save_pretrained(converted.state, converted.config, config.output, folder, extra=facts)
    return converted


def refuse_cut_towers(config: ConvertConfig, family: str, converted: Converted) -> None:
    """Raises ValueError if a release lacks its last blocks. Other checkpoints can have any size, so they get a note."""
    missing = [] if config.preset else missing_blocks(converted.config)
    if missing and family in RELEASES:
        raise ValueError(
            f"--input {config.input} does not hold the expected model: missing: {'; '.join(missing)} "
            f"(--format open_clip or transformers accepts other sizes)"
        )
    converted.notes += [f"shorter than any published: {which}" for which in missing]


def recognise(checkpoint: Checkpoint) -> str:
    """Returns the family of the keys; a TorchScript archive is OpenAI's. Raises ValueError if no family fits."""
    if checkpoint.scripted and open_clip.recognises(checkpoint.state):
        return "openai"
    for family in ("priorclip", "pir", "transformers", "open_clip"):
        if FAMILIES[family].recognises(checkpoint.state):
            return family
    found = ", ".join(sorted(checkpoint.state)[:6])
    raise ValueError(f"--input {checkpoint.source} is of no known family: its keys are {found}, ...")


def preset(config: ConvertConfig) -> ModelConfig | None:
    """Returns the configuration of ``--preset`` without weights, or None."""
    if config.preset is None:
        return None
    if config.activation is not None:
        raise ValueError("--activation cannot be used with --preset, which has its own activation")
    model = load_preset(config.preset)
    model.vision = replace(model.vision, weights=None, image_size=config.image_size or model.vision.image_size)
    model.prior = replace(model.prior, weights=None)
    model.text = replace(model.text, weights=None, context_length=config.context_length or model.text.context_length)
    if model.text.config is not None and model.text.config.get("model_type") == "clip_text_model":
        model.text.config["max_position_embeddings"] = model.text.context_length
    return model


def write_tokenizer(config: ConvertConfig, converted: Converted, folder: Path) -> None:
    """Writes the files of the tokenizer of the text encoder, or of the one that the user names."""
    length = converted.config.text.context_length
    if config.tokenizer is None and converted.tokenizer == "clip":
        entries = (converted.config.text.config or {}).get("vocab_size")
        if entries != CLIP_ENTRIES:
            raise ValueError(
                f"--input {config.input} has a text tower of {entries} entries, but CLIP's tokenizer has "
                f"{CLIP_ENTRIES}: name its tokenizer by --tokenizer"
            )
        write_clip_tokenizer(folder, length)
        return
    if config.tokenizer is None and converted.tokenizer == NOT_NAMED:
        raise ValueError(
            f"--input {config.input} does not have CLIP's tokenizer, and its own is not beside the weights: name it by "
            "--tokenizer"
        )
    name = config.tokenizer or converted.tokenizer
    try:
        tokenizer = open_tokenizer(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"{error}: name another by --tokenizer") from error
        raise OSError(
            f"the tokenizer '{name}' is no folder, and the hub does not give it: name another by --tokenizer ({error})"
        ) from error
    vocabulary = (converted.config.text.config or {}).get("vocab_size", len(tokenizer))
    if len(tokenizer) > vocabulary:
        raise ValueError(f"the tokenizer '{name}' has {len(tokenizer)} entries, but the text encoder has {vocabulary}")
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(str(folder))
