"""Reads the config.json of an export folder. Somebody else may have written it, so nothing in it is trusted.

    config = read_export_config(Path("downloaded"))         # ModelConfig or SceneConfig

It gives architecture and numbers only. It cannot name a package, a path, a hub id or code:

    "embed_dim": 128                                        taken: a number within its limits
    "vision": {"weights": "package:downloaded.x"}           ignored: the weights are in model.safetensors
    "text": {"remember": "/any/path"}                       ignored: nothing is written
    "text": {"config": {"auto_map": {"AutoModel": ...}}}    ignored: no code is loaded
    "vision": {"kwargs": {"checkpoint_path": "x.pth"}}      ValueError that names the key
    "visoin": {}                                            ValueError that names the key and the nearest one

Keys that a training of one's own writes (weights, remember, text.name) are ignored, so its exports load. No torch in
this module: options are parsed without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from priorclip.common.hub import fetch_export
from priorclip.common.untrusted_json import read_object
from priorclip.model.config import EncoderConfig, ModelConfig, SceneConfig, TextConfig, from_dict, to_dict
from priorclip.model.presets import load_preset

FORMAT = 1
MODEL_TYPE = "priorclip"  # the name of our models in transformers
FOR_READERS = ("format", "model_type", "architectures", "transformers_version", "dtype")  # top-level keys that we skip
# What `model export --format transformers` writes for other programs. We skip it too; another auto_map is refused.
CODE = "modelling_priorclip"
AUTO_MAP = {
    "AutoConfig": f"{CODE}.PriorCLIPConfig",
    "AutoModel": f"{CODE}.PriorCLIPModel",
    "AutoModelForZeroShotImageClassification": f"{CODE}.PriorCLIPModel",
}
MAX_BYTES = 4 << 20  # of config.json
MAX_NUMBER = 1e12
MAX_ITEMS = 100_000  # of a list
MAX_TEXT = 300  # characters
MAX_DEPTH = 4  # of lists and objects inside each other
LIMITS = {"image_size": 4096, "context_length": 1 << 16}
COUNTS = re.compile(r"(\w+_)?(layer|depth|block|stage)s?")  # arguments that make a model repeat modules
MAX_COUNT = 1000

# Fields that name a place. They keep their defaults.
PLACES: dict[Any, tuple[str, ...]] = {
    EncoderConfig: ("weights", "remember"),
    TextConfig: ("weights", "remember", "name"),
}
TIMM_MODEL = re.compile(r"\w+(\.\w+)?")  # a name and its tag; timm also takes hub ids and folders, as "local-dir:/x"
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")  # of an argument of timm or transformers
MODEL_NAME = re.compile(r"(package:\w{1,100}|[^:\0]{1,300})")  # no dotted package, because its parent is imported
WORD = re.compile(r"[A-Za-z0-9_+-]{0,64}")  # the only text that an argument can have: no path, URL or dotted name

# Arguments of timm's models, whose value is a word.
TIMM_WORDS = re.compile(
    r"\w*_(layer|type|pool|init|mode|act)|norm_layer_cl|mlp|pos_embed|downsample|padding|reduction|attn"
)
# Arguments of timm's loader and builder, which load weights or replace code.
TIMM_REFUSED = re.compile(
    r"pretrained(_cfg\w*|_strict|_filter_fn|_model_args)?|checkpoint_path|cache_dir|file|url|hf_hub\w*|state_dict"
    r"|custom_load|scriptable|exportable|no_jit|features_only|kwargs_filter|(\w+_)?cfg"
)
# Arguments of transformers' configurations, whose value is a word.
TEXT_WORDS = re.compile(
    r"model_type|rope_type|\w*activation(_function)?|\w*_act|\w*_act_fn|feed_forward_proj|position_embedding_type"
    r"|pos_att_type|layer_types|norm_type|normalization_type|attention_type|summary_type|classifier_pooling"
    r"|norm_rel_ebd|hidden_act\w*"
)
TEXT_REFUSED = re.compile(r"\w*backbone\w*|trust_remote_code|custom_\w+")
# Facts about where the text encoder came from, its tasks, its data type and its kernels. They do not change the model.
TEXT_IGNORED = re.compile(
    r"_?name_or_path|_commit_hash|auto_map|architectures|transformers_version|(torch_)?dtype|\w*attn_implementation\w*"
    r"|\w*experts_implementation\w*|quantization_config|kernel_config|id2label|label2id|num_labels|problem_type"
    r"|task_specific_params|finetuning_task|tokenizer_class|torchscript|gradient_checkpointing|output_\w+|return_dict"
)


def read_export_config(folder: Path) -> ModelConfig | SceneConfig:
    """Returns the configuration of an export folder, without the names of packages, paths and hub ids.

    Raises:
        FileNotFoundError: the folder has no config.json
        ValueError: another format, an unknown key, a value of the wrong type or over its limit; names file and key
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no export folder: it has no config.json")
    values = read_object(path, MAX_BYTES)
    if values.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {values.get('format')!r:.40}; this version reads format {FORMAT}")
    try:
        return config_from_untrusted(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_from_untrusted(values: Mapping[str, Any]) -> ModelConfig | SceneConfig:
    """Returns the configuration from values that somebody else wrote. Raises ValueError that names the key."""
    kind: Any = SceneConfig if values.get("kind") == "scene" else ModelConfig
    if "kind" not in values:
        raise ValueError("it has no 'kind', such as 'priorclip'")
    skipped = {*FOR_READERS, *(["auto_map"] if values.get("auto_map") == AUTO_MAP else [])}
    config: Any = from_dict(kind, check_fields({key: values[key] for key in values if key not in skipped}, kind, ""))
    if kind is ModelConfig and config.text.config is None:
        raise ValueError("it has no 'text.config', the architecture of the text encoder")
    return config


def config_of_run(values: Any) -> ModelConfig:
    """Returns the model of a run's config.yaml, which can be somebody else's, by the same rules.

    ``text.name`` is kept if there is no ``text.config``: a hub id, a folder or a package, from which sizes are read.
    Raises ValueError that names the key.
    """
    config: ModelConfig = from_dict(ModelConfig, check_fields(values, ModelConfig, "model."))
    if config.text.config is None:
        name = (values.get("text") or {}).get("name")
        if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
            raise ValueError(f"'model.text.name' is {describe(name)}, not a hub id, a folder or a package")
        config.text.name = name
    return config


def check_fields(values: Any, cls: Any, where: str) -> dict[str, Any]:
    """Returns the values for the dataclass ``cls`` after the checks; ``where`` is the dotted prefix of their keys."""
    if not isinstance(values, dict):
        raise ValueError(f"'{where.rstrip('.')}' must be a JSON object, not {describe(values)}")
    types = get_type_hints(cls)
    known = {key: value for key, value in values.items() if key not in PLACES.get(cls, ())}
    for key in known:
        if not isinstance(key, str):
            raise ValueError(f"the key {describe(key)} in '{where.rstrip('.')}' is no text")
        if key not in types:
            near = difflib.get_close_matches(key, list(types), n=1, cutoff=0)
            raise ValueError(f"unknown key '{where}{key[:MAX_TEXT]}': did you mean '{where}{near[0]}'?")
    return {key: check_value(value, types[key], f"{where}{key}") for key, value in known.items()}


def check_value(value: Any, hint: Any, where: str) -> Any:
    """Returns the value of the field ``where`` if it fits the type ``hint``. Raises ValueError that names the field."""
    if dataclasses.is_dataclass(hint):
        return check_fields(value, hint, f"{where}.")
    if where.endswith("text.config") and value is not None:
        return check_arguments(value, where, TEXT_WORDS, TEXT_REFUSED, TEXT_IGNORED)
    if where.endswith(".name") and not (isinstance(value, str) and TIMM_MODEL.fullmatch(value)):
        raise ValueError(f"'{where}' is {describe(value)}, not the name of a timm model")
    if where.endswith(".kwargs"):
        return check_arguments(value, where, TIMM_WORDS, TIMM_REFUSED)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (each for each in arguments if each is not type(None))
        return check_value(value, hint, where)
    if origin is list and isinstance(value, list) and len(value) <= MAX_ITEMS:
        return [check_value(item, arguments[0], where) for item in value]
    fits = (
        (origin is Literal and isinstance(value, str) and value in arguments)
        or (hint is bool and isinstance(value, bool))
        or (hint is int and isinstance(value, int) and is_number(value, LIMITS.get(where.rpartition(".")[2])))
        or (hint is float and is_number(value))
        or (hint is str and isinstance(value, str) and len(value) <= MAX_TEXT)
    )
    if not fits:
        wanted = " or ".join(map(str, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
        limit = LIMITS.get(where.rpartition(".")[2])
        raise ValueError(f"'{where}' is {describe(value)}, not {wanted}" + (f" up to {limit}" if limit else ""))
    return value


def check_arguments(
    values: Any, where: str, words: re.Pattern[str], refused: re.Pattern[str], ignored: re.Pattern[str] | None = None
) -> dict[str, Any]:
    """Returns arguments for a model of timm or transformers: numbers, true, false, null, and words under some keys.

    Args:
        values: the arguments by name
        where: dotted name of the field, for messages
        words: names of arguments whose value is a word, or a list of words
        refused: names of arguments that name files or code
        ignored: names of arguments that are left out, at any depth
    """

    def check(value: Any, key: str, place: str, depth: int) -> Any:
        limit = MAX_COUNT if COUNTS.fullmatch(key) else MAX_NUMBER
        if value is None or isinstance(value, bool) or is_number(value, limit):
            return value
        if isinstance(value, str) and words.fullmatch(key) and WORD.fullmatch(value):
            return value
        if isinstance(value, list) and depth < MAX_DEPTH and len(value) <= MAX_ITEMS:
            return [check(item, key, place, depth + 1) for item in value]
        if isinstance(value, dict) and depth < MAX_DEPTH:
            return check_all(value, place, depth + 1)
        raise ValueError(f"'{place}' is {describe(value)}; it can be a number up to {limit:g}, true, false or null")

    def check_all(given: Mapping[str, Any], prefix: str, depth: int) -> dict[str, Any]:
        kept = {key: value for key, value in given.items() if ignored is None or not ignored.fullmatch(str(key))}
        for key in kept:
            if refused.fullmatch(str(key)) or not NAME.fullmatch(str(key)):
                raise ValueError(f"'{prefix}.{str(key)[:MAX_TEXT]}' is refused: it can name files or code")
        return {key: check(value, key, f"{prefix}.{key}", depth) for key, value in kept.items()}

    if not isinstance(values, dict):
        raise ValueError(f"'{where}' must be a JSON object, not {describe(values)}")
    return check_all(values, where, 0)


def is_number(value: Any, limit: float | None = None) -> bool:
    """Tells whether the value is a finite number up to the limit, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= (limit or MAX_NUMBER) and math.isfinite(value)


def describe(value: Any) -> str:
    """Returns the value for a message, cut to 60 characters."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


def starting_architecture(export: str | None, preset: str) -> dict[str, Any]:
    """Returns the configuration that a training starts from, as plain values: an export folder's, or the preset's.

    Raises:
        ValueError: no such preset; the folder is no export, or holds a scene classifier
        OSError: ``export`` is on the hub, which does not give it
    """
    if export is None:
        return to_dict(load_preset(preset))
    folder = fetch_export(export, ("config.json",))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{export} is not an exported model: it has no config.json (a run exports to RUN/export)")
    config = read_export_config(folder)
    if isinstance(config, SceneConfig):
        raise ValueError(f"{export} is a scene classifier: give it as --model.prior.weights, not as --init_from")
    return to_dict(config)
