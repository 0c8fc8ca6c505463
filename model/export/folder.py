"""Export folders: a model as files that load anywhere, offline.

    FOLDER/config.json                 format version, kind, the resolved configuration (no paths of this machine)
           model.safetensors           all weights, so loading needs no hub and no weight package
           tokenizer files             as they were in the tokenizer's folder
           preprocessor_config.json    size, mean and standard deviation of the input
           README.md                   model card with the figures it was given

    save_pretrained(model.state_dict(), model.config, "runs/demo/export", tokenizer_folder="runs/demo/tokenizer")
    model = from_pretrained("runs/demo/export")

The folder is written aside and renamed into place: it is there whole or not at all.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from priorclip.model.build import build_model
from priorclip.model.config import MODEL_TYPE, ModelConfig, SceneConfig, from_dict, plain_values, to_dict
from priorclip.model.encoders.text import resolve
from priorclip.model.encoders.vision import ImageEncoder, normalisation
from priorclip.model.encoders.weights import adapted, load_exactly
from priorclip.model.networks.priorclip import PriorCLIP
from priorclip.model.networks.scene_classifier import SceneClassifier

log = logging.getLogger(__name__)

FORMAT = 1
HUB_SECONDS = 20  # for the hub's first answer
FRESH = ("prior.", "visual.instruction.", "visual.narrow.", "visual.layers.", "visual.norm.")
OWN_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")


def save_pretrained(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig | SceneConfig,
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the export folder, replacing one that is there.

    Args:
        state_dict: all weights, whole (under ZeRO-3: gathered)
        config: of the model; its architecture is what the weights are checked against
        folder: where to
        tokenizer_folder: folder whose files are copied beside the weights
        extra: figures and facts for the model card, name -> value or nested names
    Raises:
        ValueError: the weights do not fit the configuration
    """
    folder = Path(folder)
    resolved = portable(config)
    check_fit(state_dict, resolved)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), aside)
        write_json(aside / "config.json", {"format": FORMAT, **for_transformers(resolved), **to_dict(resolved)})
        write_json(aside / "preprocessor_config.json", preprocessor(resolved))
        (aside / "README.md").write_text(model_card(resolved, state_dict, extra or {}), encoding="utf-8")
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()},
            aside / "model.safetensors",
            metadata={"format": "pt"},
        )
        publish(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def publish(aside: Path, folder: Path) -> None:
    """Flush a finished folder to the disk and rename it into place; the one that it replaces is removed after."""
    for path in [*aside.iterdir(), aside]:
        path.chmod(0o755 if path == aside else 0o644)  # safetensors and mkdtemp keep them to their owner
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = Path(f"{aside}.old")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def from_pretrained(folder: str | Path, **hub: Any) -> Any:
    """The model of an export folder, or of one on the hub by its id, in eval mode.

    It is a `PriorCLIP`, `PriorITR`, `PlainCLIP` or `SceneClassifier`, as the folder says.

    Args:
        folder: folder, or ``owner/name`` where there is no such folder
        hub: options of huggingface_hub.snapshot_download: revision, cache_dir, token, local_files_only
    Raises:
        FileNotFoundError: the folder or a file of it is not there
        ValueError: the weights do not fit; the message names missing and unexpected keys
    """
    folder = located(folder, **hub)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no export folder: it has no {name}")
    model = create(read_config(folder))
    load_weights(model, folder)
    return model.eval()


def located(folder: str | Path, **hub: Any) -> Path:
    """The folder itself, or a copy of the hub's of that id. FileNotFoundError where there is neither."""
    path = Path(folder).expanduser()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "*token*",
        "*vocab*",
        "merges.txt",
    ]
    try:
        return Path(snapshot_download(str(folder), allow_patterns=files, etag_timeout=HUB_SECONDS, **hub))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{folder} is no folder here, and the hub does not give it: {error}") from error


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of an export folder into a model of the same architecture. ValueError where they do not fit.

    A PriorCLIP also starts from a plain CLIP: its prior, and the layers that read the prior, stay as they were made.
    Position embeddings of another image size are resampled.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no export folder: it has no {path.name}")
    state = load_file(path)
    if isinstance(model, PriorCLIP) and not any(name.startswith(FRESH) for name in state):
        fresh = {name: value for name, value in model.state_dict().items() if name.startswith(FRESH)}
        prior = model.config.prior
        log.info("%s is a plain CLIP: the instruction starts at random, the prior from %s", folder, prior.weights)
        if prior.weights is None and not prior.trainable:
            log.warning(
                "the prior '%s' is random and frozen: name its weights by --model.prior.weights (finetune prior makes "
                "them), or train it by --model.prior.trainable true",
                prior.name,
            )
        state |= fresh
    for name, encoder in model.named_modules():
        if isinstance(encoder, ImageEncoder):
            state |= resized(state, f"{name}.model.", encoder)
    load_exactly(model, state, str(path))


def resized(state: Mapping[str, Tensor], prefix: str, encoder: ImageEncoder) -> dict[str, Tensor]:
    """The encoder's part of a state, brought to its image size; nothing where it is of that size."""
    wanted = encoder.model.state_dict()
    own = {name: state[prefix + name] for name in wanted if prefix + name in state}
    if all(value.shape == wanted[name].shape for name, value in own.items()):
        return {}
    changed = adapted(own, encoder.model)
    if any(changed[name].shape != wanted[name].shape for name in own if name in changed):
        return {}  # not another image size, but another architecture
    log.info("%s: position embeddings are resampled to %d pixels", encoder.config.name, encoder.config.image_size)
    return {prefix + name: value for name, value in changed.items()}


def read_config(folder: Path) -> ModelConfig | SceneConfig:
    """The configuration in an export folder."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    version = values.get("format")
    if version != FORMAT:
        raise ValueError(f"{folder / 'config.json'} is of format {version}; this version reads format {FORMAT}")
    values = plain_values(values)
    return from_dict(SceneConfig, values) if values["kind"] == "scene" else from_dict(ModelConfig, values)


def for_transformers(config: ModelConfig | SceneConfig) -> dict[str, Any]:
    """What makes ``AutoModel`` take the folder (model/export/transformers_auto.py)."""
    return {} if isinstance(config, SceneConfig) else {"model_type": MODEL_TYPE, "architectures": ["PriorCLIPModel"]}


def create(config: ModelConfig | SceneConfig) -> nn.Module:
    return SceneClassifier(config) if isinstance(config, SceneConfig) else build_model(config)


def portable(config: ModelConfig | SceneConfig) -> ModelConfig | SceneConfig:
    """The configuration resolved, and without the names of files and folders that only this machine has."""
    config = copy.deepcopy(config)
    if isinstance(config, SceneConfig):
        encoders = [config.backbone]
    else:
        encoders = [config.vision, config.prior]
        config.text = resolve(config.text)
        config.text.weights = config.text.remember = None
        if config.text.name is not None and Path(config.text.name).expanduser().exists():
            config.text.name = None
    for encoder in encoders:
        encoder.mean, encoder.std = normalisation(encoder)
        encoder.weights = encoder.remember = None
    return config


def check_fit(state_dict: Mapping[str, Tensor], config: ModelConfig | SceneConfig) -> None:
    """Build the model without memory and compare names and shapes, so that what is written can be read."""
    with torch.device("meta"):
        model = create(config)
        load_exactly(model, {name: torch.empty(value.shape) for name, value in state_dict.items()}, "the state dict")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of the tokenizer's folder, but none that this export writes itself."""
    if not source.is_dir():
        raise FileNotFoundError(f"no tokenizer folder {source}")
    weights = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx")
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in OWN_FILES and path.suffix not in weights:
            shutil.copyfile(path, target / path.name)


def preprocessor(config: ModelConfig | SceneConfig) -> dict[str, Any]:
    """Facts about the input. The models take uint8 pixels and normalise on the device by themselves."""
    encoder = config.backbone if isinstance(config, SceneConfig) else config.vision
    side = encoder.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": encoder.mean,
        "image_std": encoder.std,
    }


def model_card(config: ModelConfig | SceneConfig, state_dict: Mapping[str, Tensor], extra: Mapping[str, Any]) -> str:
    """README.md: what the model is, how to load it, the figures."""
    size = sum(value.numel() for value in state_dict.values()) / 1e6
    if isinstance(config, SceneConfig):
        title, facts = "Scene classifier", {"backbone": config.backbone.name, "classes": len(config.classes)}
    else:
        title = {"priorclip": "PriorCLIP", "prioritr": "PriorITR", "clip": "CLIP"}[config.kind]
        text = config.text.name or (config.text.config or {}).get("model_type")
        facts = {
            "vision": config.vision.name,
            "prior": config.prior.name,
            "text": text,
            "width": config.embed_dim,
        }
    lines = [
        "---",
        "library_name: pytorch",
        "tags: [remote-sensing, image-text-retrieval]",
        "---",
        f"# {title}",
        "",
    ]
    lines += [f"{size:.1f} M values. Method: PriorCLIP, arXiv 2405.10160.", ""]
    lines += ["| part | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += ["```python", "from priorclip.model import from_pretrained", "model = from_pretrained(FOLDER)", "```", ""]
    if extra:
        rows = [f"| {name} | {shown(value)} |" for name, value in flat(extra)]
        lines += ["## Figures", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested names joined by dots."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
