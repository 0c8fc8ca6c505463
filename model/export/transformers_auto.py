"""transformers' ``AutoModel`` and ``AutoConfig`` for export folders.

    import priorclip.model          # after transformers; or: import priorclip.model.export.transformers_auto
    model = AutoModel.from_pretrained("runs/demo/export")
    images = AutoImageProcessor.from_pretrained("runs/demo/export")(pictures, return_tensors="pt")
    model(**images, input_ids=ids, attention_mask=mask).image_embeds

The wrapper holds one of our models and loads it by `from_pretrained`, so both ways give the same weights, and a
configuration of somebody else is read in the same safe way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from priorclip.common.hub import fetch_export
from priorclip.common.output import get_logger
from priorclip.model.build import build_model
from priorclip.model.config import ModelConfig, to_dict
from priorclip.model.export.folder import WEIGHTS, from_pretrained, save_pretrained
from priorclip.model.export_config import FOR_READERS, MODEL_TYPE, config_from_untrusted

log = get_logger(__name__)

SLACK = 0.25  # beyond [0, 1]: resampling of floats overshoots by less, normalised pixels reach -2 and 2
HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only")


class PriorCLIPConfig(PreTrainedConfig):
    """Our configuration in transformers' form: ``architecture`` holds the values of `ModelConfig`.

    Other keys of a config.json, such as ``auto_map`` or ``_attn_implementation``, are left out.
    """

    model_type = MODEL_TYPE

    def __init__(self, architecture: dict[str, Any] | None = None, **values: Any):
        own = {name: values.pop(name) for name in to_dict(ModelConfig()) if name in values}
        super().__init__(**{name: value for name, value in values.items() if name in FOR_READERS})
        self.architecture = architecture or own

    def ours(self) -> ModelConfig:
        """Returns the configuration of our model. Raises ValueError that names an unknown key or a bad value."""
        config = config_from_untrusted(self.architecture)
        if not isinstance(config, ModelConfig):
            raise ValueError("a scene classifier has no transformers model")
        return config


@dataclass
class PriorCLIPOutput(ModelOutput):
    """Args:
    image_embeds: (B, d) or None, L2-normalised
    text_embeds: (B, d) or None, L2-normalised
    logits_per_image: (B, T) scaled similarities, or None
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None


class PriorCLIPModel(PreTrainedModel):
    """PriorCLIP, PriorITR or plain CLIP with transformers' interface."""

    config_class = PriorCLIPConfig
    base_model_prefix = "inner"
    main_input_name = "pixel_values"

    def __init__(self, config: PriorCLIPConfig, inner: torch.nn.Module | None = None):
        super().__init__(config)
        self.inner: Any = build_model(config.ours()) if inner is None else inner
        self.source: Path | None = None  # the export folder that it was loaded from

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> PriorCLIPOutput:
        """Returns features of images and texts.

        Args:
            pixel_values: (B, 3, H, W), uint8 or float in [0, 1]; the model normalises them
            input_ids: (T, L)
            attention_mask: (T, L)
        Raises:
            ValueError: the pixels are normalised already, or not scaled to [0, 1]
        """
        check_pixels(pixel_values)
        outputs = self.inner(pixel_values, input_ids, attention_mask)
        image, text = outputs["image_features"], outputs["text_features"]
        both = image is not None and text is not None
        return PriorCLIPOutput(image, text, outputs["logit_scale"] * image @ text.T if both else None)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, config: Any = None, **options: Any) -> PriorCLIPModel:  # type: ignore[override]
        """Returns the model of an export folder or a hub id, in eval mode; ``dtype`` converts its weights."""
        hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        source = fetch_export(folder, **hub)
        inner = from_pretrained(source)
        model = cls(PriorCLIPConfig(architecture=to_dict(inner.config)), inner)
        model.source = source
        dtype = options.get("dtype") or options.get("torch_dtype")
        return model.to(dtype).eval() if isinstance(dtype, torch.dtype) else model.eval()  # type: ignore[arg-type]

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Writes an export folder of ours, with the tokenizer of the folder that the model was loaded from.

        The model card with its figures is copied too, if the weights are still those that the figures are of.

        Args:
            folder: output folder
            is_main_process: False writes nothing
            state_dict: weights of this model to write in place of its own, as Accelerate gathers them
            push_to_hub: refused
        Raises:
            ValueError: ``push_to_hub`` is set, or the weights do not fit
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not supported: save, then huggingface_hub.upload_folder(...)")
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix("inner."): value for name, value in state.items()}
        if self.source is None:
            log.warning("%s gets no tokenizer, because the model was not loaded from an export folder", folder)
            save_pretrained(weights, self.inner.config, folder)
            return
        card = self.source / "README.md"
        if not card.is_file() or not has_weights(self.source, weights):
            log.info("%s: the card gets no figures, because the weights are not those of %s", folder, self.source)
            save_pretrained(weights, self.inner.config, folder, self.source)
        else:
            text = card.read_text(encoding="utf-8", errors="replace")
            save_pretrained(weights, self.inner.config, folder, self.source, card=text)


def has_weights(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Tells whether the folder holds these weights, bit for bit."""
    if not (folder / WEIGHTS).is_file():
        return False
    with safe_open(folder / WEIGHTS, "pt") as file:
        if set(file.keys()) != set(weights):
            return False
        return all(same_tensor(file.get_tensor(name), value) for name, value in weights.items())


def same_tensor(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other.detach().cpu())


def check_pixels(pixels: Tensor | None) -> None:
    """Raises ValueError for pixels that are neither uint8 nor in [0, 1], because the model would normalise them again.

    An image processor that normalises gives such pixels, among them that of export folders of version 0.1.
    """
    if pixels is None or pixels.dtype == torch.uint8 or pixels.is_meta or torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in pixels.detach().aminmax())
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(
            f"pixel_values reach from {low:.3g} to {high:.3g}, but this model takes uint8 or [0, 1] and normalises "
            f"them itself: set do_normalize to false (and do_rescale to true) in preprocessor_config.json"
        )


AutoConfig.register(MODEL_TYPE, PriorCLIPConfig, exist_ok=True)
AutoModel.register(PriorCLIPConfig, PriorCLIPModel, exist_ok=True)
