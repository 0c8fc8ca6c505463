"""Text encoders: any transformers model for text, with token states and one pooled state.

    input_ids (B, T), attention_mask (B, T) -> states (B, T, C) -> pooled (B, C): first, mean or last token

Padding never changes a feature: padded positions are masked, and pooling uses real positions only. So it is cut where
that is exact (`padding`). The model is built from its configuration alone and its weights are loaded later, so an
exported model needs neither hub nor packages.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModelWithProjection, PreTrainedConfig

from priorclip.common.hub import NotFetched, reading
from priorclip.common.packages import PACKAGE
from priorclip.model.config import TextConfig
from priorclip.model.encoders.feature_cache import FeatureCache
from priorclip.model.encoders.layers import keep_locked, lock
from priorclip.model.encoders.padding import cut_padding, draws_dropout, is_masked
from priorclip.model.encoders.weights import State, first_names, load_exactly, one_file, read_state, weight_package

# In these models a token reads only the tokens before it, and padding is at the end.
CAUSAL = ("clip_text_model",)


class TextEncoder(nn.Module):
    """A transformers text model.

    ``config`` is the resolved configuration: ``config.config`` holds the whole architecture.
    """

    def __init__(self, config: TextConfig, vocab_size: int | None = None):
        super().__init__()
        self.config = resolve(config, vocab_size)
        assert self.config.config is not None
        architecture = transformers_config(self.config.config)
        check_length(config.context_length, architecture)
        self.model: Any = build_text_model(architecture)
        self.width: int = architecture.hidden_size
        self.clip_projection = None if config.weights is None else load_pretrained(self.model, config)
        self.feature_cache = FeatureCache(config.remember, self.model, self.config.config) if config.remember else None
        if not config.trainable:
            self.requires_grad_(False)
        elif config.unlocked is not None:
            lock(self.model, config.unlocked, config.name)
        self.train()  # frozen modules have no dropout, from the first step on

    def train(self, mode: bool = True) -> TextEncoder:
        """Sets training mode, unless the encoder is frozen."""
        super().train(mode and self.config.trainable)
        if self.config.unlocked is not None:
            keep_locked(self.model)
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states (B, T, C)."""
        # In CLIP's tower no token before the padding reads it, so it needs no mask, and attention uses its causal
        # kernel. transformers reads the values of a mask, and a tensor on the meta device has none.
        causal = self.model.config.model_type in CAUSAL and self.config.pooling == "eos"
        mask = None if causal or attention_mask.is_meta else attention_mask
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.trainable):
            if self.feature_cache is not None and mask is not None:
                return self.feature_cache(self.cut_states, input_ids, mask)
            return self.states(input_ids, mask)

    @property
    def cuts_padding(self) -> bool:
        """Whether the encoder's features are the same without the padding that no text of a batch needs."""
        return is_masked(self.model.config) and not draws_dropout(self.model, self.model.config)

    def cut_states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Token states (B, T, C), computed without common padding; they are zero there."""
        states = self.states(*cut_padding(input_ids, mask)) if self.cuts_padding else self.states(input_ids, mask)
        return F.pad(states, (0, 0, 0, input_ids.shape[1] - states.shape[1]))

    def states(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Pools states (B, T, C) -> (B, C); positions with mask 0 do not count."""
        if self.config.pooling == "cls":
            return states[:, 0]
        real = attention_mask.to(states.dtype).unsqueeze(-1)
        if self.config.pooling == "mean":
            return (states * real).sum(1) / real.sum(1).clamp(min=1)
        positions = torch.arange(states.shape[1], device=states.device)
        last = (attention_mask.long() * positions).amax(1)
        return states[torch.arange(states.shape[0], device=states.device), last]

    def set_grad_checkpointing(self, enable: bool) -> None:
        verb = "enable" if enable else "disable"
        method = getattr(self.model, f"activation_checkpointing_{verb}", None)
        if method is None:  # before transformers 5.2x
            method = getattr(self.model, f"gradient_checkpointing_{verb}")
        method({"use_reentrant": False}) if enable else method()


def resolve(config: TextConfig, vocab_size: int | None = None) -> TextConfig:
    """Returns the configuration with its architecture, from ``name`` if ``config`` is null, and its vocabulary size.

    Raises ValueError if neither is given, or if the tokenizer has more tokens than the pretrained weights.
    """
    config = copy.deepcopy(config)
    if config.config is None:
        if config.name is None:
            raise ValueError("text.name and text.config are both null: name a transformers model or give its sizes")
        config.config = read_named_config(config.name)
    if vocab_size is not None:
        known = config.config.get("vocab_size")
        if config.weights is not None and known is not None and vocab_size > known:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens, but the pretrained text encoder "
                f"'{config.name or config.weights}' knows {known}: use its own tokenizer, or text.weights null"
            )
        if config.weights is None:
            config.config["vocab_size"] = vocab_size
    return config


def read_named_config(name: str) -> dict[str, Any]:
    """Returns the configuration of a hub id, a local folder or ``package:NAME``, which the user named."""
    source = str(model_folder(name)) if name.startswith(PACKAGE) else str(Path(name).expanduser())
    try:
        with reading(source):
            loaded = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except NotFetched:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text.name '{name}' is neither a transformers model on the hub nor a folder: {error}"
        ) from error
    loaded = getattr(loaded, "text_config", None) or loaded
    values = json.loads(json.dumps(loaded.to_diff_dict() | {"model_type": loaded.model_type}))
    values.pop("auto_map", None)  # names code
    return values


def model_folder(source: str) -> Path:
    """Returns the folder with config.json and weights inside an installed package."""
    return one_file(weight_package(source), is_model_config, "transformers config.json").parent


def is_model_config(path: Path) -> bool:
    return path.name == "config.json" and "model_type" in json.loads(path.read_text(encoding="utf-8"))


def transformers_config(values: dict[str, Any]) -> PreTrainedConfig:
    """Returns a transformers configuration from plain values. Raises ValueError on an unknown ``model_type``."""
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError("text.config has no model_type (such as 'bert' or 'clip_text_model')")
    return AutoConfig.for_model(model_type, **values)


def check_length(context_length: int, architecture: PreTrainedConfig) -> None:
    limit = getattr(architecture, "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(f"text.context_length {context_length} is over the text encoder's {limit} positions")


def build_text_model(architecture: PreTrainedConfig) -> Any:
    """Returns the encoder with random weights, without its own pooling layer, which would not be used."""
    auto = AutoModelForTextEncoding if type(architecture) in AutoModelForTextEncoding._model_mapping else AutoModel
    model_class = auto._model_mapping[type(architecture)]
    pooler = "add_pooling_layer" in inspect.signature(cast(type, model_class)).parameters
    options = {"add_pooling_layer": False} if pooler else {}
    return auto.from_config(architecture, attn_implementation="sdpa", trust_remote_code=False, **options)


def load_pretrained(model: Any, config: TextConfig) -> Tensor | None:
    """Loads the weights that ``config.weights`` names. Returns CLIP's text projection (d, C) if they hold one."""
    source = config.weights or ""
    if source == "hub":
        if config.name is None:
            raise ValueError("text.weights is 'hub', but text.name is null: name the hub's model")
        source = config.name
    path = str(model_folder(source)) if source.startswith(PACKAGE) else str(Path(source).expanduser())
    if Path(path).is_file():
        state = read_state(Path(path))
    else:
        state = read_pretrained(model, path if Path(path).exists() else source)
    projection = state.pop("text_projection.weight", None)
    load_exactly(model, fit_names(state, model), source)
    return projection


def read_pretrained(model: Any, source: str) -> State:
    """Returns the weights of a hub id or a folder as transformers reads them: old names, shards, .bin files.

    Raises ValueError if weights of the model are missing, because transformers would leave them random.
    """
    clip = model.config.model_type == "clip_text_model"
    kind: Any = CLIPTextModelWithProjection if clip else type(model)
    pooler = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    try:
        with reading(source):
            loaded, info = kind.from_pretrained(source, output_loading_info=True, weights_only=True, **pooler)
    except NotFetched:
        raise
    except (OSError, RuntimeError) as error:
        raise ValueError(f"text weights '{source}' do not load as {kind.__name__}: {error}") from error
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ValueError(f"the weights of {source} do not fit {kind.__name__}: missing: {first_names(missing)}")
    return dict(loaded.state_dict())


def fit_names(state: State, model: nn.Module) -> State:
    """Renames weights to the model's names: removes prefixes (``bert.``) and the parts that the encoder lacks."""
    wanted = model.state_dict().keys()
    prefixes = ("", f"{getattr(model, 'base_model_prefix', '')}.", "text_model.")
    heads = ("pooler.", "cls.", "vision_model.", "visual_projection.", "logit_scale")
    fitted: State = {}
    for name, value in state.items():
        short = next((name.removeprefix(p) for p in prefixes if name.removeprefix(p) in wanted), None)
        if short is not None:
            fitted[short] = value
        elif not name.endswith("position_ids") and not name.removeprefix("bert.").startswith(heads):
            fitted[name] = value
    return fitted
