"""From the command to the first step, compared with open_clip's trainer on the same shards, in one run.

    python -m benchmarks.start --rounds 3

Each trainer starts as a process of its own with tiny models, one data worker and one thread, and is ended when its
log has the first step. Measured are wall-clock time and the processor time of all its processes until then. They take
turns, so that other load of the machine affects both. It prints the medians and the ratio ours / open_clip's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.open_clip_trainer import TRAINER

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 12},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SAMPLES, SHARD, BATCH = 128, 32, 32
POLL_SECONDS = 0.02
LIMIT_SECONDS = 600


def pack(folder: Path) -> None:
    words = ["--source", "synthetic", "--size", "48", "--count", str(SAMPLES), "--shard-size", str(SHARD)]
    commands = [
        ["pack", *words, "--workers", "1", "--output", str(folder / "shards")],
        ["tokenizer", "--shards", str(folder / "shards"), "--output", str(folder / "tokenizer"), "--vocab-size", "400",
         "--context-length", "24"],
    ]  # fmt: skip
    for command in commands:
        subprocess.run([sys.executable, "-m", "data_shards", *command], check=True, stdout=subprocess.DEVNULL)


def ours(folder: Path, run: Path) -> tuple[list[str], Path]:
    vit = {"img_size": 48, "patch_size": 12, "embed_dim": 64, "depth": 2, "num_heads": 2}
    words = ["--preset", "priorclip-tiny", "--data.shards", folder / "shards", "--tokenizer", folder / "tokenizer",
             "--data.workers", 1, "--data.image_size", 48, "--model.vision.name", "vit_tiny_patch16_224",
             "--model.vision.image_size", 48, "--model.vision.kwargs", json.dumps(vit), "--model.prior.image_size", 48,
             "--model.text.context_length", 24, "--run.engine.global_batch", BATCH, "--run.engine.threads", 1,
             "--run.log_every", 1, "--run.progress", "false", "--run.dir", run]  # fmt: skip
    return [sys.executable, "-m", "pretrain", *map(str, words)], run / "metrics.jsonl"


def open_clip(folder: Path, run: Path) -> tuple[list[str], Path]:
    model = folder / "tiny.json"
    model.write_text(json.dumps(TINY))
    last = SAMPLES // SHARD - 1
    words = ["--train-data", f"{folder}/shards/shard-{{000000..{last:06d}}}.tar", "--dataset-type", "webdataset",
             "--train-num-samples", SAMPLES, "--model", "tiny", "--batch-size", BATCH, "--workers", 1,
             "--device", "cpu", "--precision", "fp32", "--logs", run.parent, "--name", run.name,
             "--log-every-n-steps", 1]  # fmt: skip
    code = TRAINER.format(model=str(model))
    return [sys.executable, "-c", code, *map(str, words)], run / "out.log"


def start(command: Sequence[str], log: Path, step: str) -> dict[str, float]:
    """Returns wall-clock and processor seconds until the log matches ``step``."""
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                 "HF_HUB_OFFLINE": "1"}  # fmt: skip
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
        while not (log.is_file() and re.search(step, log.read_text())):
            if process.poll() is not None or time.monotonic() - begun > LIMIT_SECONDS:
                process.kill()
                output.seek(0)
                raise SystemExit(f"no step: {command}\n{output.read()[-3000:]}")
            time.sleep(POLL_SECONDS)
        wall = time.monotonic() - begun
        whole = psutil.Process(process.pid)
        family = [whole, *whole.children(recursive=True)]
        ended = whole.cpu_times()
        processor = ended.children_user + ended.children_system
        processor += sum(each.cpu_times().user + each.cpu_times().system for each in family)
        for each in family:
            each.kill()
        process.wait()
    return {"wall": wall, "processor": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    measured: dict[str, list[dict[str, float]]] = {"ours": [], "open_clip": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack(folder)
        for number in range(args.rounds):
            command, log = ours(folder, folder / f"ours-{number}")
            measured["ours"].append(start(command, log, r'"train/loss"'))
            command, log = open_clip(folder, folder / f"open_clip-{number}")
            measured["open_clip"].append(start(command, log, r"Contrastive_loss: "))
    for kind in ("processor", "wall"):
        own, peer = (statistics.median(each[kind] for each in measured[who]) for who in ("ours", "open_clip"))
        print(f"{kind} seconds to the first step: ours {own:.1f}, open_clip {peer:.1f}, ratio {own / peer:.2f}")


if __name__ == "__main__":
    main()
