"""The options of `python -m model`: one dataclass per sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["auto", "openai", "open_clip", "remoteclip", "georsclip", "priorclip", "pir", "transformers"]


@dataclass
class ConvertConfig:
    """Convert a published checkpoint to an export folder; code in pickles is never executed.

    Args:
        input: .pt, .pth, .bin or .safetensors file, or a transformers folder
        output: export folder to write
        format: the family of checkpoints; auto recognises it by the file's keys
        preset: take heads, activation, image size, prior and normalisation from this preset, not from the keys
        image_size: side of the input in pixels; position embeddings are interpolated to it; null keeps the checkpoint's
        context_length: longest text in tokens; a shorter one cuts the position embeddings; null keeps the checkpoint's
        activation: of CLIP's layers; null: quick_gelu for OpenAI's weights and those that GeoRSCLIP tuned from them,
            otherwise gelu
        tokenizer: hub id, folder or package:NAME of a tokenizer; null: the tokenizer of the family
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
    """Write a run's checkpoint, or an export folder, in a format that other programs read.

    Args:
        input: run directory, or export folder; a file of a checkpoint that could run code is refused, so it need not
            come from you
        output: folder to write
        format: export: an export folder. open_clip: the CLIP part in open_clip's format. onnx: both towers.
            transformers: a folder that transformers loads without this project; a plain CLIP becomes its CLIPModel
        checkpoint: name of a checkpoint of the run; null takes the newest
        tokenizer: hub id or folder, for a run that has not ended; null takes the tokenizer of the run's configuration
    """

    input: str
    output: str
    format: Literal["export", "open_clip", "onnx", "transformers"] = "export"
    checkpoint: str | None = None
    tokenizer: str | None = None


@dataclass
class SummaryConfig:
    """Print the parameters of a preset by part, trained and frozen, and its FLOPs per image and per text.

    Args:
        preset: a name in model/presets
        format: markdown (a table) or json
        memory: also print the activation memory per micro batch; it is computed without a GPU, in a minute for a large
            preset
        precision: number format of parameters and activations, for --memory
    """

    preset: str = "priorclip-b32"
    format: Literal["markdown", "json"] = "markdown"
    memory: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"


@dataclass
class BenchConfig:
    """Time forward and backward passes of a preset and of open_clip's model with the same towers, in turn.

    Args:
        preset: a name in model/presets; weights are random
        peer: name of an open_clip architecture to compare with; null: the preset only
        batch: pairs per step
        runs: timed steps of each model; the figures are medians
        dtype: number format of weights and activations
        device: auto takes the GPU if there is one
        compile: compile both models by torch.compile
        optimizer: include a step of AdamW in the time
        peak_tflops: the GPU's dense peak in this dtype, for MFU; null: looked up by the GPU's name
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
            raise ValueError(f"--peak_tflops must be above 0, not {self.peak_tflops}")


@dataclass
class PushConfig:
    """Put an export folder with its model card on the Hugging Face hub.

    The token is that of HF_TOKEN, or of `hf auth login`. Only the files of an export are uploaded.

    Args:
        input: export folder
        repo: user/name or organisation/name; it is created if it does not exist
        format: export: the folder as it is. transformers: as `model export --format transformers` writes it
        public: everybody may read the model; otherwise the repository is private, and a public one is refused
        license: the hub's name of the licence, such as mit or cc-by-nc-4.0, for the card
        training_data: a sentence about the training data, for the card
        example: a picture that the hub's widget shows
        labels: descriptions for the widget to choose from, comma-separated
        message: of the commit
    """

    input: str
    repo: str
    format: Literal["export", "transformers"] = "export"
    public: bool = False
    license: str | None = None
    training_data: str | None = None
    example: str | None = None
    labels: str = "storage tanks, a river, an airport, a forest"
    message: str = "Upload a model"


@dataclass
class FetchConfig:
    """Fetch from the hub into HF_HOME what a training needs, so that a node without internet can train.

    With HF_HUB_OFFLINE=1 it fetches nothing and checks whether everything is there.

    Several names of an option are comma-separated.

    Args:
        preset: names in model/presets
        timm: timm models whose pretrained weights to fetch, for --model.vision.name or --backbone.name
        transformers: hub ids of text encoders, with their tokenizers, for --model.text.name
        init_from: exports on the hub as hf://user/name, for --init_from
    """

    preset: str = ""
    timm: str = ""
    transformers: str = ""
    init_from: str = ""

    def __post_init__(self) -> None:
        if not (self.preset or self.timm or self.transformers or self.init_from):
            raise ValueError("name what to fetch: --preset, --timm, --transformers or --init_from")


COMMANDS: dict[str, type[Any]] = {
    "convert": ConvertConfig,
    "export": ExportConfig,
    "push": PushConfig,
    "fetch": FetchConfig,
    "summary": SummaryConfig,
    "bench": BenchConfig,
}
