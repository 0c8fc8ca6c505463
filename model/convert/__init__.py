"""Published checkpoints as export folders of ours: read, recognise, rename, check, write.

python -m model convert --input RemoteCLIP-ViT-B-32.pt --output converted --format remoteclip
python -m retrieval evaluate --model converted --data dataset.json --images images

checkpoint.py   the file: safetensors, weights_only, or a TorchScript archive; nothing in it is executed
FAMILY.py       whose names it has, what model its shapes make, which tensor of theirs each of ours is
rules.py        fills our model; what is missing or does not fit is an error, what is left over is listed
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from priorclip.model.commands import ConvertConfig
from priorclip.model.config import ModelConfig
from priorclip.model.convert import open_clip, pir, priorclip_release, transformers_clip
from priorclip.model.convert.checkpoint import Checkpoint, read_checkpoint
from priorclip.model.convert.clip_tokenizer import write_clip_tokenizer
from priorclip.model.convert.family import Converted, Request, lacking_blocks
from priorclip.model.export.folder import save_pretrained
from priorclip.model.presets import load_preset

log = logging.getLogger(__name__)

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
    """Write the export folder; returns what it was made of.

    Raises:
        OSError: a file that is not there
        ValueError: a checkpoint of another family, or one that lacks a tensor; the message names file and keys
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
    if converted.tokenizer != "clip":
        text.name = converted.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(config, converted, Path(folder))
        facts = {"source": Path(config.input).name, "format": family}
        save_pretrained(converted.state, converted.config, config.output, folder, extra=facts)
    return converted


def refuse_cut_towers(config: ConvertConfig, family: str, converted: Converted) -> None:
    """ValueError where a release lacks its last blocks; of others, whose sizes are their own, it is a note."""
    lacking = [] if config.preset else lacking_blocks(converted.config)
    if lacking and family in RELEASES:
        raise ValueError(
            f"--input {config.input} does not hold the model that it should: missing: {'; '.join(lacking)} "
            f"(--format open_clip or transformers takes other sizes)"
        )
    converted.notes += [f"shorter than any published: {which}" for which in lacking]


def recognise(checkpoint: Checkpoint) -> str:
    """The family whose names the keys have. A TorchScript archive is OpenAI's way. ValueError where none has them."""
    if checkpoint.scripted and open_clip.recognises(checkpoint.state):
        return "openai"
    for family in ("priorclip", "pir", "transformers", "open_clip"):
        if FAMILIES[family].recognises(checkpoint.state):
            return family
    found = ", ".join(sorted(checkpoint.state)[:6])
    raise ValueError(f"--input {checkpoint.source} is of no family that is known: its keys are {found}, ...")


def preset(config: ConvertConfig) -> ModelConfig | None:
    """The configuration that is asked for by name, without weights of its own."""
    if config.preset is None:
        return None
    if config.activation is not None:
        raise ValueError("--activation and --preset: the preset has its own activation")
    model = load_preset(config.preset)
    model.vision = replace(model.vision, weights=None, image_size=config.image_size or model.vision.image_size)
    model.prior = replace(model.prior, weights=None)
    model.text = replace(model.text, weights=None, context_length=config.context_length or model.text.context_length)
    if model.text.config is not None and model.text.config.get("model_type") == "clip_text_model":
        model.text.config["max_position_embeddings"] = model.text.context_length
    return model


def write_tokenizer(config: ConvertConfig, converted: Converted, folder: Path) -> None:
    """The files of the tokenizer that the text encoder was trained with, or that the user names."""
    length = converted.config.text.context_length
    if config.tokenizer is None and converted.tokenizer == "clip":
        write_clip_tokenizer(folder, length)
        return
    from transformers import AutoTokenizer

    name = config.tokenizer or converted.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the tokenizer '{name}' is no folder, and the hub does not give it: --tokenizer names another ({error})"
        ) from error
    vocabulary = (converted.config.text.config or {}).get("vocab_size", len(tokenizer))
    if len(tokenizer) > vocabulary:
        raise ValueError(f"the tokenizer '{name}' has {len(tokenizer)} entries, the text encoder knows {vocabulary}")
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(str(folder))
