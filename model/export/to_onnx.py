"""Both towers as ONNX files, for runtimes without Python or torch. Needs the extra ``onnx``.

    FOLDER/image.onnx    images uint8 (B, 3, S, S) -> image_features float32 (B, d), L2-normalised
           text.onnx     input_ids, attention_mask int64 (B, T) -> text_features float32 (B, d), L2-normalised
           tokenizer and preprocessor files, and onnx.json: scale, sizes, names

B is free; S and T are those of the model. Pixels are normalised inside, as in the model. The image tower of a model of
bands takes measured values, float32 (B, n, S, S), and onnx.json names the bands.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from priorclip.common.files import folder_aside
from priorclip.common.output import get_logger
from priorclip.model.encoders.bands import blank_images
from priorclip.model.export.folder import copy_tokenizer, write_json, write_preprocessor

log = get_logger(__name__)

OPSET = 18
REQUIRED = ("onnx", "onnxscript")


class ImageTower(nn.Module):
    """The image encoder of a model alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)


class TextTower(nn.Module):
    """The text encoder of a model alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.encode_text(input_ids, attention_mask)


def export_onnx(model: Any, folder: str | Path, source: str | Path) -> Path:
    """Writes both towers into a folder and replaces an existing one.

    Args:
        model: PriorCLIP, PriorITR or plain CLIP, in eval mode
        folder: output folder
        source: export folder whose tokenizer is copied
    Raises:
        ValueError: the extra is not installed, or torch cannot express the model in ONNX
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install .[onnx]")
    folder = Path(folder)
    size, length = model.config.vision.image_size, model.config.text.context_length
    bands = model.config.vision.bands
    images = blank_images(2, size, bands)
    ids, mask = torch.ones(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
    with folder_aside(folder) as aside:
        write_tower(ImageTower(model), (images,), ["images"], "image_features", aside / "image.onnx")
        write_tower(
            TextTower(model), (ids, mask), ["input_ids", "attention_mask"], "text_features", aside / "text.onnx"
        )
        copy_tokenizer(Path(source), aside, length)
        write_preprocessor(aside, model.config, rescale=False)
        scale = model(images[:1])["logit_scale"].item()
        facts = {
            "logit_scale": scale,
            "image_size": size,
            "context_length": length,
            "embed_dim": model.config.embed_dim,
            **({} if bands is None else {"bands": bands}),
        }
        write_json(aside / "onnx.json", facts)
    return folder


def stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """The stable sort of belief in ONNX, for which the exporter has no rule: TopK also keeps equal values in order.

    ``dim`` is the last dimension.
    """
    from onnxscript import opset18 as op

    return op.TopK(values, op.Shape(values, start=dim), axis=dim, largest=int(descending), sorted=1)


def write_tower(tower: nn.Module, inputs: tuple[Tensor, ...], names: list[str], output: str, path: Path) -> None:
    """Writes one tower as one file with its weights; the first axis is free."""
    batch = torch.export.Dim("batch")
    exporter_log = logging.getLogger("onnxscript")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecation warnings inside the exporter
            torch.onnx.export(
                tower.eval(),
                inputs,
                str(path),
                input_names=names,
                output_names=[output],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"torch cannot express {type(tower).__name__} of this model in ONNX: {reason}") from error
    finally:
        exporter_log.setLevel(level)
