"""The model package: encoders, belief, PAE, PriorITR and PriorCLIP, losses, recall, export.

    from model import load_preset, build_model
    model = build_model(load_preset("priorclip-tiny"), vocab_size=4096)
    outputs = model(images, input_ids, attention_mask)      # dict of features and scales
    loss, parts = RetrievalLoss(lambda_cs=1.0)(outputs, image_ids, labels)

Pure torch: it knows nothing of shards, runs or clusters. Names are imported when first used, so that reading a
configuration (``--help``) does not load torch.
"""

# ruff: noqa: F401 (the imports for type checkers only)
from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.build import build_model, parameter_groups
    from model.config import (
        BeliefConfig,
        EncoderConfig,
        FusionConfig,
        LossConfig,
        ModelConfig,
        PAEConfig,
        SceneConfig,
        TextConfig,
        from_dict,
        load_preset,
        preset_names,
        to_dict,
    )
    from model.export import from_pretrained, load_weights, save_pretrained
    from model.losses import AttributionLoss, ContrastiveLoss, RetrievalLoss
    from model.objective import RetrievalObjective
    from model.prior import SceneClassifier
    from model.priorclip import PriorCLIP
    from model.prioritr import PriorITR
    from model.recall import chance, recall_at_k, retrieval_metrics

HOME = {
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
        "load_preset",
        "preset_names",
        "to_dict",
    ),
    "export": ("from_pretrained", "load_weights", "save_pretrained"),
    "losses": ("AttributionLoss", "ContrastiveLoss", "RetrievalLoss"),
    "objective": ("RetrievalObjective",),
    "prior": ("SceneClassifier",),
    "priorclip": ("PriorCLIP",),
    "prioritr": ("PriorITR",),
    "recall": ("chance", "recall_at_k", "retrieval_metrics"),
}
WHERE = {name: module for module, names in HOME.items() for name in names}
__all__ = sorted(WHERE)


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'model' has no attribute '{name}'")
    return getattr(importlib.import_module(f"model.{WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__


if "transformers" in sys.modules:  # AutoModel then knows our folders; else ``import model.auto`` tells it
    importlib.import_module("model.auto")
