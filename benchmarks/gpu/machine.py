"""The device that is measured: its name, its memory and its peak."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch

from priorclip.model.cost.peak_tflops import peak_of
from priorclip.model.device import pick_device


def measure_machine(_: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts about the device; the peak is None if it is neither known nor given."""
    device = pick_device(settings["kind"])
    facts: dict[str, Any] = {"device": "cpu", "memory_bytes": psutil.virtual_memory().total, "cuda": None}
    peak = None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        facts = {"device": about.name, "memory_bytes": about.total_memory, "cuda": torch.version.cuda}
        peak = peak_of(about.name, "bf16" if settings["precision"] == "bf16" else "float32")
    return {
        **facts,
        "peak_tflops": settings.get("peak_tflops") or peak,
        "cores": len(os.sched_getaffinity(0)),
    }
