"""The options of `python -m model`: one dataclass a sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["auto", "openai", "open_clip", "remoteclip", "georsclip", "priorclip", "pir", "transformers"]


@dataclass
class ConvertConfig:
    """Turn a published checkpoint into an export folder of ours; pickles are never executed.

    Args:
        input: .pt, .pth, .bin or .safetensors file, or a transformers folder
        output: export folder to write
        format: whose names the file's keys have; auto tells by the keys
        preset: take heads, activation, resolution, prior and normalisation from this preset, not from the keys
        image_size: side of the input in pixels; null keeps the checkpoint's, others interpolate its positions
        context_length: longest text in tokens; null keeps the checkpoint's, shorter cuts its positions
        activation: of CLIP's layers; null: quick_gelu for OpenAI's weights and GeoRSCLIP's made of them, else gelu
        tokenizer: hub id, folder or package:NAME of another tokenizer than the family's own
    """

    input: str
    output: str
    format: Family = "auto"
    preset: str | None = None
    image_size: int | None = None
    context_length: int | None = None
    activation: Literal["gelu", "quick_gelu"] | None = None
    tokenizer: str | None = None


COMMANDS: dict[str, type[Any]] = {"convert": ConvertConfig}
