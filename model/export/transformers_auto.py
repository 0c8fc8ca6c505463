"""transformers' ``AutoModel`` and ``AutoConfig`` for export folders.

    import priorclip.model          # after transformers; or: import priorclip.model.export.transformers_auto
    model = AutoModel.from_pretrained("runs/demo/export")
    model(pixel_values=images, input_ids=ids, attention_mask=mask).image_embeds

The wrapper holds one of our models and loads it by `from_pretrained`, so both ways give the same weights, and a
configuration of somebody else is read in the same safe way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from priorclip.model.build import build_model
from priorclip.model.config import ModelConfig, to_dict
from priorclip.model.export.folder import from_pretrained, save_pretrained
from priorclip.model.export_config import FOR_READERS, MODEL_TYPE, config_from_untrusted

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
        """
        outputs = self.inner(pixel_values, input_ids, attention_mask)
        image, text = outputs["image_features"], outputs["text_features"]
        both = image is not None and text is not None
        return PriorCLIPOutput(image, text, outputs["logit_scale"] * image @ text.T if both else None)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, config: Any = None, **options: Any) -> PriorCLIPModel:  # type: ignore[override]
        """Returns the model of an export folder or a hub id, in eval mode; ``dtype`` converts its weights."""
        hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        inner = from_pretrained(folder, **hub)
        model = cls(PriorCLIPConfig(architecture=to_dict(inner.config)), inner)
        dtype = options.get("dtype") or options.get("torch_dtype")
        return model.to(dtype).eval() if isinstance(dtype, torch.dtype) else model.eval()  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Writes an export folder of ours."""
        save_pretrained(self.inner.state_dict(), self.inner.config, folder)


AutoConfig.register(MODEL_TYPE, PriorCLIPConfig, exist_ok=True)
AutoModel.register(PriorCLIPConfig, PriorCLIPModel, exist_ok=True)
