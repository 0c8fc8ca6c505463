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


@dataclass
class ExportConfig:
    """Write a run's checkpoint, or an export folder, in the format that another program reads.

    Args:
        input: run directory, or export folder; a file of a checkpoint that could run code is refused, so it need not
            come from you
        output: folder to write
        format: export: a folder of ours. open_clip: the plain CLIP part in its format. onnx: both towers
        checkpoint: of a run, the name of one under checkpoints; null takes the newest
        tokenizer: of a run that has not ended, hub id or folder; null takes the one that the run was told
    """

    input: str
    output: str
    format: Literal["export", "open_clip", "onnx"] = "export"
    checkpoint: str | None = None
    tokenizer: str | None = None


@dataclass
class SummaryConfig:
    """Print the parameters of a preset by part, trained and frozen, and its FLOPs an image and a text.

    Args:
        preset: a name in model/presets
        format: markdown, a table; or json
        memory: also the memory of activations by micro batch, found without any memory; a minute for a large preset
        precision: of parameters and activations, for their memory
    """

    preset: str = "priorclip-b32"
    format: Literal["markdown", "json"] = "markdown"
    memory: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"


@dataclass
class BenchConfig:
    """Time forward and backward passes of a preset against open_clip's model of the same towers, interleaved.

    Args:
        preset: a name in model/presets; weights are random
        peer: name of an open_clip architecture to compare with; null times the preset alone
        batch: pairs a step
        runs: timed steps of each; the figures are medians
        dtype: number format of weights and activations
        device: auto takes the GPU where there is one
        compile: both go through torch.compile
        optimizer: a step of AdamW is timed as well
        peak_tflops: the GPU's dense peak in that dtype, for MFU; null looks the GPU up by its name
        format: table or json
    """

    preset: str = "priorclip-b32"
    peer: str | None = "ViT-B-32-quickgelu"
    batch: int = 8
    runs: int = 5
    dtype: Literal["float32", "bf16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    optimizer: bool = False
    peak_tflops: float | None = None
    format: Literal["table", "json"] = "table"

    def __post_init__(self) -> None:
        for name, least in (("batch", 2), ("runs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak_tflops must be over 0, not {self.peak_tflops}")


COMMANDS: dict[str, type[Any]] = {
    "convert": ConvertConfig,
    "export": ExportConfig,
    "summary": SummaryConfig,
    "bench": BenchConfig,
}
