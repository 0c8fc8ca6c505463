"""`python -m model export`: from a run or an export folder to a folder for us, transformers, open_clip or ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path

from priorclip.model.commands import ExportConfig
from priorclip.model.export.folder import from_pretrained


def export(config: ExportConfig) -> str:
    """Writes the output and returns a message for the user.

    Raises:
        OSError, ValueError: the input does not suit the format; the message says what to do
    """
    source = Path(config.input)
    exported = (source / "model.safetensors").is_file()
    if config.format == "export":
        if exported:
            raise ValueError(f"--input {source} is an export folder already: --format transformers, open_clip or onnx")
        from priorclip.model.export.from_checkpoint import export_run

        export_run(source, config.output, config.checkpoint, config.tokenizer)
        return f"{config.output}: export folder"
    if exported:
        return write_format(source, config)
    from priorclip.model.export.from_checkpoint import export_run

    with tempfile.TemporaryDirectory() as folder:
        return write_format(export_run(source, Path(folder) / "export", config.checkpoint, config.tokenizer), config)


def write_format(folder: Path, config: ExportConfig) -> str:
    """Writes an export folder in another format and returns a message for the user."""
    model = from_pretrained(folder)
    if not hasattr(model, "encode_text"):
        raise ValueError(f"--input {folder} is a {type(model).__name__}: it has no two towers")
    if config.format == "onnx":
        from priorclip.model.export.to_onnx import export_onnx

        return f"{export_onnx(model, config.output, folder)}: image.onnx, text.onnx"
    if config.format == "transformers":
        from priorclip.model.export.to_transformers import export_transformers

        return export_transformers(model, config.output, folder)
    from priorclip.model.export.to_open_clip import export_open_clip

    return f"{export_open_clip(model, config.output, folder)}: open_clip folder, read it as local-dir:{config.output}"
