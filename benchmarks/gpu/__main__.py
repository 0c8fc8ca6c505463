"""Measures this system on one GPU, beside open_clip, and writes the figures as JSON and as a page.

    python -m benchmarks.gpu --output runs/gpu                                   # all sections, ten minutes at most
    python -m benchmarks.gpu --output runs/gpu --sections models --presets priorclip-l14 --batch 256 --minutes 5
    python -m benchmarks.gpu --output runs/gpu --device cpu                      # a tiny model: shows that it runs
    python -m cluster plan --preset priorclip-b32 --gpus 8x80GB --bench runs/gpu/gpu.json

Sections, which docs/gpu.md explains:

    models       images/s, MFU and memory of a training step, eager and compiled, and those of open_clip in turn
    kernels      time by kernel, the kernel that attention took, waits of the processor for the GPU
    zero         step time and memory by ZeRO stage and offload
    grad_cache   the same by global batch with gradient caching
    losses       time, memory and error of the losses by batch, beside open_clip's ClipLoss
    loader       images/s that the loader delivers a core, beside what the models need

Each section runs in a process of its own. A case that fails, for instance because memory is out, is recorded with its
reason, and the rest goes on in a new process. What the time does not reach is recorded as not measured. Exit code 1 if
a case failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import MODES, SECTIONS, STAGES, name_of, settings_of, work
from benchmarks.gpu.page import page_of, put_into_page, summary_of
from benchmarks.gpu.run_cases import Budget, kind_of_device, processes_for, run_cases
from benchmarks.gpu.versions import commit, versions
from priorclip.common.command_line import print_error, run_command
from priorclip.common.files import write_text
from priorclip.common.launching import display_command
from priorclip.common.output import say, set_up_logging

PROG = "benchmarks.gpu"


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code: 0 done, 1 a case failed, 2 wrong options."""
    set_up_logging("%(levelname)s %(message)s")
    words = sys.argv[1:] if argv is None else argv
    options = parse(words)
    return run_command(PROG, lambda: measure(options, words))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROG, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.json, gpu.md and logs")
    parser.add_argument("--page", type=Path, help="page to write the figures into, such as docs/gpu.md")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=at_least_0, default=10.0, help="what is not reached by then is listed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--presets", nargs="+", help="names in model/presets; default: B/32, B/16 and L/14")
    parser.add_argument("--batch", type=positive, help="pairs a step; default by preset: 512, 256, 128")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="of the models; default: both on a GPU")
    parser.add_argument("--steps", type=positive, help="steps of a repeat")
    parser.add_argument("--repeats", type=positive, help="of each timing, ours and open_clip's in turn")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16, on a CPU fp32")
    parser.add_argument("--zero", choices=STAGES, default="0", help="ZeRO stage of all sections except zero")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="of the section zero")
    parser.add_argument("--global_batches", nargs="+", type=positive, help="of the section grad_cache")
    parser.add_argument("--micro_batch", type=positive, help="of the section grad_cache")
    parser.add_argument("--loss_sizes", nargs="+", type=positive, help="pairs of the section losses")
    parser.add_argument("--matmul", nargs="+", choices=("highest", "high", "medium"),
                        help="run.engine.matmul_precision of the section losses")  # fmt: skip
    parser.add_argument("--loader_images", type=positive, help="images of the section loader")
    parser.add_argument("--loader_side", type=positive, help="their side in pixels")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: all cores")
    parser.add_argument("--peak_tflops", type=positive_number, help="of the device; default: known by its name")
    return parser.parse_args(words)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def at_least_0(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def measure(options: argparse.Namespace, words: list[str]) -> int:
    """Runs all cases, writes the files and returns the exit code."""
    begun = time.monotonic()
    budget = Budget(options.minutes)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options, kind_of_device(options.device))
    for name in ("output", "page", "device", "minutes"):  # of this process only
        settings.pop(name, None)
    processes = processes_for(settings["kind"], budget)
    found: dict[str, Any] = {
        "benchmark": "gpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": display_command(["python", "-m", PROG, *words]),
        "commit": commit(),
        "versions": versions(),
        "machine": machine_facts(processes, settings, options.output),
        "settings": settings,
        "minutes": options.minutes,
    }
    found |= {section: [] for section in options.sections}
    found["not_measured"] = []
    settings["peak_tflops"] = found["machine"]["peak_tflops"]
    for section, cases in work(settings):
        for outcome in run_cases(processes, section, cases, settings, budget, options.output):
            if outcome.row is not None:
                found[section].append(outcome.case | outcome.row)
                say(f"{section}: {name_of(outcome.case)}: {summary_of(section, outcome.row)}")
            else:
                found["not_measured"].append(
                    {"section": section, "case": name_of(outcome.case), "failed": outcome.failed,
                     "reason": outcome.reason}
                )  # fmt: skip
                say(f"{section}: {name_of(outcome.case)}: not measured: {outcome.reason}")
    found["seconds"] = round(time.monotonic() - begun, 1)
    write(found, options)
    failed = sum(each["failed"] for each in found["not_measured"])
    if failed:
        print_error(PROG, f"{failed} of the cases failed: their reasons are in {options.output / 'gpu.md'}")
    return int(failed > 0)


def machine_facts(processes: Any, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns name, memory and peak of the device. Raises ValueError if even that fails."""
    (outcome,) = run_cases(processes, "machine", [{}], settings, Budget(None), folder)
    if outcome.row is None:
        raise ValueError(f"the device cannot be used: {outcome.reason}")
    return outcome.row


def write(found: dict[str, Any], options: argparse.Namespace) -> None:
    text = page_of(found)
    write_text(options.output / "gpu.json", json.dumps(found, indent=1) + "\n")
    write_text(options.output / "gpu.md", text)
    say(f"{options.output / 'gpu.json'}, {options.output / 'gpu.md'}: {found['seconds']:.0f} s")
    if options.page is not None:
        put_into_page(options.page, text)
        say(f"{options.page}: written")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
