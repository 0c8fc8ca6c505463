"""The section `kernels`: where the time of a step goes, which attention ran, and how often the processor waits.

measure_kernels({"preset": "priorclip-b32"}, settings)["kernels"][0]
-> {"name": "sm90_xmma_gemm_bf16...", "calls": 96.0, "seconds": 0.021, "share": 0.18}      of one step
"""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.cases import batch_of
from benchmarks.gpu.engine_steps import start_engine
from benchmarks.gpu.timing import Step, repeated, take
from priorclip.model.cost.step_bench import synchronise

SHOWN = 15
# The operator that torch calls for each way to compute attention.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash, CPU",
    "aten::_scaled_dot_product_efficient_attention": "memory efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
    "aten::_scaled_dot_product_attention_math": "math",
}
SYNCHRONISING = "called a synchronizing CUDA operation"  # torch's warning, after its place in the code
NOT_COUNTED = "not counted: a CPU computes each operator when it is called, so that nothing can wait"


def measure_kernels(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the kernels of a step with their shares, the attention kernels, and the waits of a step."""
    batch = batch_of(settings, case["preset"])
    run, _ = start_engine(settings, preset=case["preset"], batch=batch)
    seconds = statistics.median(repeated({"ours": run.step}, settings["steps"], 1, run.device)["ours"])
    found = profiled(run.step, settings["steps"], run.device)
    waits = None if run.device.type == "cpu" else synchronisations(run.step)
    run.end()
    return {
        "batch": batch,
        "step_seconds": seconds,
        **found,
        "busy": found["kernel_seconds"] / seconds,
        "synchronisations": None if waits is None else sum(waits.values()),
        "places": {} if waits is None else dict(waits.most_common(SHOWN)),
        "synchronisations_note": NOT_COUNTED if waits is None else None,
    }


def profiled(step: Step, count: int, device: torch.device) -> dict[str, Any]:
    """Returns the kernels that take most of the time of a step, on a CPU its operators, and the ways of attention."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as watch:
        take(step, count)
        synchronise(device)
    events = watch.key_averages()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    timed = [(event.key, event.count, microseconds(event, gpu)) for event in events
             if event.device_type == wanted and not getattr(event, "is_user_annotation", False)]  # fmt: skip
    whole = sum(spent for _, _, spent in timed)
    rows = sorted(timed, key=lambda row: row[2], reverse=True)[:SHOWN]
    attention = Counter[str]()
    for event in events:
        if event.key in ATTENTION:
            attention[ATTENTION[event.key]] += event.count
    return {
        "kernel_seconds": whole / count / 1e6,
        "kernels": [
            {"name": name, "calls": calls / count, "seconds": spent / count / 1e6, "share": spent / whole}
            for name, calls, spent in rows
        ],
        "attention": {name: calls / count for name, calls in attention.items()},
    }


def microseconds(event: Any, gpu: bool) -> float:
    return float(event.self_device_time_total if gpu else event.self_cpu_time_total)


def synchronisations(step: Step) -> Counter[str]:
    """Counts the operations of one step for which the processor waits for the GPU, by the line that calls them."""
    root = Path(__file__).resolve().parents[2]
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = Counter[str]()
    for each in caught:
        if SYNCHRONISING in str(each.message):
            path = Path(each.filename)
            shown = path.relative_to(root) if path.is_relative_to(root) else Path(*path.parts[-3:])
            found[f"{shown}:{each.lineno}"] += 1
    return found
