"""The model package: encoders, belief, PAE, PriorITR and PriorCLIP, losses, recall, export.

    from priorclip.model import load_preset, build_model
    model = build_model(load_preset("priorclip-tiny"), vocab_size=4096)
    outputs = model(images, input_ids, attention_mask)      # dict of features and scales
    loss, parts = RetrievalLoss(lambda_cs=1.0)(outputs, image_ids, labels)

Pure torch, without shards, runs or clusters. Names are imported at their first use, so that reading a configuration
(``--help``) does not load torch.
"""

# ruff: noqa: F401 (the imports for type checkers only)
from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from priorclip.model.build import build_model, parameter_groups
    from priorclip.model.config import (
        BeliefConfig,
        EncoderConfig,
        FusionConfig,
        LossConfig,
        ModelConfig,
        PAEConfig,
        SceneConfig,
        TextConfig,
        from_dict,
        to_dict,
    )
    from priorclip.model.export.folder import from_pretrained, load_weights, save_pretrained
    from priorclip.model.losses.attribution import AttributionLoss
    from priorclip.model.losses.contrastive import ContrastiveLoss
    from priorclip.model.losses.retrieval_loss import RetrievalLoss
    from priorclip.model.networks.priorclip import PriorCLIP
    from priorclip.model.networks.prioritr import PriorITR
    from priorclip.model.networks.scene_classifier import SceneClassifier
    from priorclip.model.objective import RetrievalObjective
    from priorclip.model.presets import load_preset, preset_names
    from priorclip.model.recall import chance, recall_at_k, retrieval_metrics

NAMES = {
    "build": ("build_model", "parameter_groups"),
    "config": (
        "BeliefConfig",
        "EncoderConfig",
        "FusionConfig",
        "LossConfig",
        "ModelConfig",
        "PAEConfig",
        "SceneConfig",
        "TextConfig",
        "from_dict",
        "to_dict",
    ),
    "presets": ("load_preset", "preset_names"),
    "export.folder": ("from_pretrained", "load_weights", "save_pretrained"),
    "losses.attribution": ("AttributionLoss",),
    "losses.contrastive": ("ContrastiveLoss",),
    "losses.retrieval_loss": ("RetrievalLoss",),
    "objective": ("RetrievalObjective",),
    "networks.scene_classifier": ("SceneClassifier",),
    "networks.priorclip": ("PriorCLIP",),
    "networks.prioritr": ("PriorITR",),
    "recall": ("chance", "recall_at_k", "retrieval_metrics"),
}
MODULE_OF = {name: module for module, names in NAMES.items() for name in names}
__all__ = sorted(MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module 'model' has no attribute '{name}'")
    return getattr(importlib.import_module(f"priorclip.model.{MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


# Registers our models in AutoModel. If transformers is imported later: import priorclip.model.export.transformers_auto
if "transformers" in sys.modules:
    importlib.import_module("priorclip.model.export.transformers_auto")
