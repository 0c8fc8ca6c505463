"""transformers' ``AutoModel`` and ``AutoConfig`` for export folders.

    import model                                        # after transformers; or: import model.auto
    found = AutoModel.from_pretrained("runs/demo/export")
    found(pixel_values=images, input_ids=ids, attention_mask=mask).image_embeds

The wrapper holds one of our models and loads it by our own reader, so that both ways give the same weights.
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
from priorclip.model.config import MODEL_TYPE, ModelConfig, from_dict, plain_values, to_dict
from priorclip.model.export.folder import from_pretrained, save_pretrained

HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only")


class PriorCLIPConfig(PreTrainedConfig):
    """Our configuration as transformers keeps it: ``architecture`` holds the values of `ModelConfig`."""

    model_type = MODEL_TYPE

    def __init__(self, architecture: dict[str, Any] | None = None, **values: Any):
        own = {name: values.pop(name) for name in to_dict(ModelConfig()) if name in values}
        super().__init__(**values)
        self.architecture = architecture or own

    def ours(self) -> ModelConfig:
        """The configuration as our models take it."""
        return from_dict(ModelConfig, plain_values(self.architecture))


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
    """PriorCLIP, PriorITR or plain CLIP behind transformers' interface."""

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
        """Features of images and texts.

        Args:
            pixel_values: (B, 3, H, W), uint8 or float in [0, 1]: the model normalises them by itself
            input_ids: (T, L)
            attention_mask: (T, L)
        """
        found = self.inner(pixel_values, input_ids, attention_mask)
        image, text = found["image_features"], found["text_features"]
        both = image is not None and text is not None
        return PriorCLIPOutput(image, text, found["logit_scale"] * image @ text.T if both else None)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, config: Any = None, **options: Any) -> PriorCLIPModel:  # type: ignore[override]
        """The model of an export folder or a hub id, in eval mode; ``dtype`` converts its weights."""
        hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        inner = from_pretrained(folder, **hub)
        model = cls(PriorCLIPConfig(architecture=to_dict(inner.config)), inner)
        dtype = options.get("dtype") or options.get("torch_dtype")
        return model.to(dtype).eval() if isinstance(dtype, torch.dtype) else model.eval()  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write an export folder of ours."""
        save_pretrained(self.inner.state_dict(), self.inner.config, folder)


AutoConfig.register(MODEL_TYPE, PriorCLIPConfig, exist_ok=True)
AutoModel.register(PriorCLIPConfig, PriorCLIPModel, exist_ok=True)
