"""Time and peak memory of a step, on a GPU and on a CPU.

step, peak = with_peak(device, lambda: build_something_and_return_its_step())
seconds = repeated({"ours": step, "open_clip": other}, settings, device)    # {"ours": [0.1, 0.1, 0.1], ...}
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.rank_memory import STEPS, allocations
from priorclip.model.cost.step_bench import BenchedModel, synchronise, take_turns
from priorclip.model.device import pick_device

Step = Callable[[], object]
WARM = 3  # steps before the measurement on a GPU: kernels are chosen, compiled models compile


def settings_device(settings: Mapping[str, Any]) -> torch.device:
    """Returns the device of the settings, and sets the threads of a CPU."""
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    return pick_device(settings["kind"])


def with_peak(device: torch.device, build: Callable[[], Step], warm: int = WARM) -> tuple[Step, int]:
    """Calls ``build``, takes some steps, and returns the step and the most bytes allocated during the last one.

    Bytes count from before the build, so that they include weights, gradients and the optimizer's states.
    ``warm`` steps come before, on a CPU one.
    """
    gc.collect()
    if device.type == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
            step = build()
            for number in range(STEPS):
                with record_function(f"step {number}"):
                    step()
        return step, allocations(watch)["peak"]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    step = build()
    for _ in range(warm):
        step()
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronise(device)
    return step, torch.cuda.max_memory_allocated(device) - before


def repeated(steps: Mapping[str, Step], count: int, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Returns for each of the steps the seconds of one, once a repeat. In a repeat, each is taken ``count`` times.

    They take turns, so that what else the machine does affects all of them.
    """
    timed = [BenchedModel(name, partial(take, step, count), 0, [], []) for name, step in steps.items()]
    take_turns(timed, repeats, device)
    return {one.name: [seconds / count for seconds in one.seconds] for one in timed}


def take(step: Step, count: int) -> None:
    for _ in range(count):
        step()
