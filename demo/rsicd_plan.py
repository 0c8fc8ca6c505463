"""The best row of docs/evidence.md on RSICD, from its images: shards, scene prior, training, recall on the test set."""

from __future__ import annotations

import os
from pathlib import Path

from demo.config import DemoConfig
from demo.plans import pack, require_files
from demo.steps import Step
from priorclip.common.cpu_features import has_bfloat16

HERE = Path(os.path.relpath(Path(__file__).parent))
ANNOTATIONS = "dataset_rsicd_aid.json"
SPLITS = ("train", "val", "test")


def rsicd_plan(config: DemoConfig, folder: Path) -> list[Step]:
    """Returns the steps. The prior and the model learn from the training images; validation selects the epoch.

    The model trains in bfloat16 if the CPU computes it, because that is faster, else in float32.

    Raises:
        ValueError: there is no data folder, or it lacks a file
    """
    data = require_files(config, "images", ANNOTATIONS)
    shards = folder / "shards"
    source = ("--source", "karpathy", "--json", str(data / ANNOTATIONS), "--images", str(data / "images"))

    def training(name: str, title: str, command: str, *words: str) -> Step:
        options = ("--config", str(HERE / "rsicd" / f"{name}.yaml"), "--run.dir", str(folder / name),
                   "--run.seed", str(config.seed), "--data.shards", str(shards / "train"),
                   "--evaluation.shards", str(shards / "val"))  # fmt: skip
        return Step(name, title, "finetune", (command, *options, *words), config.ranks)

    return [
        *(pack(split, f"packing the {split} images", shards / split, *source, "--split", split) for split in SPLITS),
        training("prior", "scene prior: learning the scenes of the training images", "prior"),
        training("tuned", "closed domain: training on the captions, validation selects the epoch", "closed",
                 "--run.engine.zero", str(config.zero), "--model.prior.weights", str(folder / "prior" / "export"),
                 "--run.engine.precision", "bf16" if has_bfloat16() else "fp32"),
        Step("recall", "recall on the test images", "retrieval",
             ("evaluate", "--model", str(folder / "tuned" / "export"), "--data", str(shards / "test"),
              "--output", str(folder / "recall.json"))),
    ]  # fmt: skip
