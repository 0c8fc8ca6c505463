"""The settings of the GPU benchmark, and its cases in the order in which they are measured. Imports no torch.

    settings = settings_of(options, "cuda")
    work(settings)     # [("models", [{"preset": "priorclip-b32", "mode": "eager"}, ...]), ("kernels", ...), ...]

Compiled models come last, because their compilation takes most of the time: if the time is short, everything else is
measured.
"""

from __future__ import annotations

import argparse
from typing import Any

SECTIONS = ("models", "kernels", "zero", "grad_cache", "losses", "loader")
MODES = ("eager", "compiled")
STAGES = ("0", "1", "2", "3", "zero2-offload", "zero3-offload")
# Pairs a step of the presets. They fit into 80 GB.
BATCHES = {"priorclip-b32": 512, "priorclip-b16": 256, "priorclip-l14": 128}
OTHER_BATCH = {"cuda": 128, "cpu": 8}

Case = dict[str, Any]

# What an option is if it is not given. A CPU gets tiny sizes, which show that everything runs.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "presets": list(BATCHES), "modes": list(MODES), "precision": "bf16", "steps": 10, "repeats": 5,
        "micro_batch": 256, "global_batches": [512, 4096, 32768], "loss_sizes": [4096, 32768],
        "matmul": ["highest", "high"], "loader_images": 512, "loader_side": 256, "image_size": 224,
    },
    "cpu": {
        "presets": ["priorclip-tiny"], "modes": ["eager"], "precision": "fp32", "steps": 2, "repeats": 3,
        "micro_batch": 8, "global_batches": [16, 32, 64], "loss_sizes": [256, 1024], "matmul": ["highest"],
        "loader_images": 64, "loader_side": 96, "image_size": 96,
    },
}  # fmt: skip


def settings_of(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Returns all settings as plain values: given options, and the defaults of the kind of device (cuda or cpu)."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    return {"batch": None, **DEFAULTS[kind], **given, "kind": kind}


def work(settings: dict[str, Any]) -> list[tuple[str, list[Case]]]:
    """Returns groups of cases, each with its section. Each group gets a process of its own."""
    presets, first = settings["presets"], settings["presets"][0]
    cases: dict[str, list[Case]] = {
        "models": [{"preset": preset, "mode": "eager"} for preset in presets],
        "kernels": [{"preset": preset} for preset in presets],
        "zero": [{"preset": first, "zero": zero} for zero in settings["stages"]],
        "grad_cache": [{"preset": first, "global_batch": size} for size in settings["global_batches"]],
        "losses": [{"size": size, "matmul": matmul} for size in settings["loss_sizes"]
                   for matmul in settings["matmul"]],
        "loader": [{"side": settings["loader_side"]}],
    }  # fmt: skip
    groups = [(name, cases[name]) for name in settings["sections"]]
    if "eager" not in settings["modes"]:
        groups = [(name, found) for name, found in groups if name != "models"]
    if "models" in settings["sections"] and "compiled" in settings["modes"]:
        groups.append(("models", [{"preset": preset, "mode": "compiled"} for preset in presets]))
    return groups


def batch_of(settings: dict[str, Any], preset: str) -> int:
    """Returns the pairs of a step of a preset."""
    return int(settings["batch"] or BATCHES.get(preset, OTHER_BATCH[settings["kind"]]))


def name_of(case: Case) -> str:
    """``{"preset": "priorclip-b32", "zero": "2"}`` -> ``"priorclip-b32, zero 2"``."""
    words = [str(value) if name in ("preset", "mode") else f"{name} {value}" for name, value in case.items()]
    return ", ".join(words)
