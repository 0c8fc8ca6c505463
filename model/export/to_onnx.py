"""Both towers as ONNX files, for runtimes without Python or torch. Needs the extra ``onnx``.

    FOLDER/image.onnx    images uint8 (B, 3, S, S) -> image_features float32 (B, d), L2-normalised
           text.onnx     input_ids, attention_mask int64 (B, T) -> text_features float32 (B, d), L2-normalised
           tokenizer and preprocessor files, and onnx.json: scale, sizes, names

B is free; S and T are the model's. Normalisation of pixels is inside, as it is in the model.
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
from priorclip.model.export.folder import copy_tokenizer, preprocessor, write_json

log = logging.getLogger(__name__)

OPSET = 18
NEEDED = ("onnx", "onnxscript")


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
    """Write both towers into a folder, replacing one that is there.

    Args:
        model: PriorCLIP, PriorITR or plain CLIP, in eval mode
        folder: where to
        source: export folder whose tokenizer is copied
    Raises:
        ValueError: the extra is not installed, or torch cannot express the model in ONNX
    """
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise ValueError(f"--format onnx needs {', '.join(lacking)}: pip install .[onnx]")
    folder = Path(folder)
    size, length = model.config.vision.image_size, model.config.text.context_length
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    ids, mask = torch.ones(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
    with folder_aside(folder) as aside:
        write_tower(ImageTower(model), (images,), ["images"], "image_features", aside / "image.onnx")
        write_tower(
            TextTower(model), (ids, mask), ["input_ids", "attention_mask"], "text_features", aside / "text.onnx"
        )
        copy_tokenizer(Path(source), aside)
        write_json(aside / "preprocessor_config.json", preprocessor(model.config))
        scale = model(images[:1])["logit_scale"].item()
        facts = {
            "logit_scale": scale,
            "image_size": size,
            "context_length": length,
            "embed_dim": model.config.embed_dim,
        }
        write_json(aside / "onnx.json", facts)
    return folder


def stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Belief's order for ONNX, which the exporter has no rule for: TopK, too, keeps equal values in their order.

    ``dim`` is the last.
    """
    from onnxscript import opset18 as op

    return op.TopK(values, op.Shape(values, start=dim), axis=dim, largest=int(descending), sorted=1)


def write_tower(tower: nn.Module, inputs: tuple[Tensor, ...], names: list[str], output: str, path: Path) -> None:
    """One tower as one file, weights inside, the first axis free."""
    batch = torch.export.Dim("batch")
    quiet = logging.getLogger("onnxscript")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations
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
        quiet.setLevel(level)
