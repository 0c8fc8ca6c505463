"""Presets: named model configurations, one YAML file each in this folder.

    config = load_preset("priorclip-b32")           # priorclip-b32.yaml
    config.vision.weights = None                    # random instead of the preset's pretrained weights

A preset has the keys of `ModelConfig`. Keys that it leaves out keep their defaults.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

from priorclip.model.config import ModelConfig, from_dict

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Returns the names of the presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str) -> ModelConfig:
    """Returns the preset as a new configuration. Raises ValueError that names the nearest preset."""
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0)
        raise ValueError(f"no preset '{name}': did you mean '{near[0]}'? presets: {', '.join(preset_names())}")
    return from_dict(ModelConfig, yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
