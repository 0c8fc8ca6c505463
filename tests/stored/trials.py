"""What is asked of the stored files: the same questions to the code that wrote them, by make.py, and to today's.

Each function runs commands in a copy of ``v0.1`` and returns plain values, which JSON takes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

QUERY = "a river"
WRITTEN_STEPS, LAST_STEP = 160, 163
PRETRAINING = ["pretrain", "--config", "run/config.yaml", "--run.max_steps", str(LAST_STEP), "--run.log_every", "1"]
CONFIGS = {
    "pretrain": ["pretrain", "--config", "run/config.yaml"],
    "prior": ["finetune", "prior", "--config", "prior/config.yaml"],
    "instruct": ["finetune", "instruct", "--config", "instruct/config.yaml"],
    "closed": ["finetune", "closed", "--config", "closed/config.yaml"],
}


# Runs commands one after the other in one process, which imports torch once; what each is comes as JSON.
ONE_PROCESS = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            sys.exit(f"{words}: {end.code}")
"""


@dataclass(frozen=True)
class Place:
    """A checkout of the project, and the folder of stored files that its commands are run in."""

    code: Path
    folder: Path

    def run(self, *words: object) -> str:
        """Standard output of ``python -m WORDS``. AssertionError with the end of all output if it fails."""
        return self._python("-m", *map(str, words))

    def run_on_two_ranks(self, *words: object) -> str:
        return self.run("cluster", "launch", "--nproc", 2, "--", *words)

    def run_each(self, *commands: Sequence[object]) -> str:
        """Standard output of several commands, one after the other."""
        return self._python("-c", ONE_PROCESS, json.dumps([list(map(str, words)) for words in commands]))

    def _python(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment(self.code), capture_output=True, text=True,
            timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    def copy(self, folder: Path) -> Place:
        """The same code with a copy of the files."""
        shutil.copytree(self.folder, folder)
        return Place(self.code, folder)


def environment(code: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(code),
        "TOKENIZERS_PARALLELISM": "false",
    }


def resumed(place: Place, ranks: int) -> dict[str, Any]:
    """Goes on with the run ``run`` up to LAST_STEP. Returns what it records, and what it exports."""
    output = place.run_on_two_ranks(*PRETRAINING) if ranks == 2 else place.run(*PRETRAINING)
    lines = (place.folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    return {
        "resumed": re.findall(r"resumed \S+: step (\d+)", output),
        "reshaped": "taken over by parameter" in output,
        "steps": [record["step"] for record in records],
        "loss": [record["train/loss"] for record in records],
        "lr": [record["train/lr"] for record in records],
        "norms": norms(place.folder / "run" / "export"),
    }


def norms(export: Path) -> dict[str, float]:
    """The Euclidean norm of each tensor of an export. A run that keeps averages exports the averages."""
    tensors = load_file(export / "model.safetensors")
    return {name: float(torch.linalg.vector_norm(value.double())) for name, value in sorted(tensors.items())}


def used(place: Place) -> dict[str, Any]:
    """Evaluates both exports on their training images. Exports the checkpoint to ``again``. Searches the index.

    Returns the recalls of both, and the keys and scores of the images that are most like QUERY.
    """
    evaluate = ["retrieval", "evaluate", "--data", "shards/train", "--bootstrap", 0]
    table = place.run_each(
        [*evaluate, "--model", "run/export", "--output", "run.json"],
        [*evaluate, "--model", "closed/export", "--output", "closed.json"],
        ["model", "export", "--input", "run", "--output", "again"],
        ["retrieval", "search", "--index", "index", "--model", "run/export", "--text", QUERY, "--k", 5],
    )
    hits = re.findall(r"^ *\d+ +(\S+) .* (scene-\d+) .*$", table, re.MULTILINE)
    return {
        "recalls": {name: recalls(place.folder / f"{name}.json") for name in ("run", "closed")},
        "hits": [(key, float(score)) for score, key in hits],
    }


def recalls(report: Path) -> dict[str, float]:
    values = json.loads(report.read_text())
    return {name: value for name, value in values.items() if re.fullmatch("mean_recall|[it]2[it]_r[0-9]+", name)}
