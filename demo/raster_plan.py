"""Finds places by words: drawn scenes with coordinates, tiles, an index, a search, a check against what was drawn."""

from __future__ import annotations

import os
from pathlib import Path

from demo.config import DemoConfig
from demo.plans import own_tokenizer, pack, tokenizer
from demo.steps import Step

HERE = Path(os.path.relpath(Path(__file__).parent))
SCENES, TILE, STRIDE = 3, 250, 125
WANTED = "forest"
SMALL = 96  # side in pixels of the pictures that the model trains on


def raster_plan(config: DemoConfig, folder: Path) -> list[Step]:
    """Returns the steps. The scenes show other drawings than those that the model trains on.

    Without ``config.model`` a tiny model is trained first.
    """
    scenes, tiles = folder / "scenes", folder / "tiles"
    model = Path(config.model) if config.model else folder / "model" / "export"
    training = [] if config.model else training_steps(config, folder)
    other = str(config.train_images + config.test_images)
    return [
        *training,
        Step("scenes", f"drawing {SCENES} scenes of {config.scene_size} x {config.scene_size} with near infrared",
             "data_shards", ("synthetic", "--output", str(scenes), "--count", str(SCENES), "--size",
                             str(config.scene_size), "--cell", str(TILE), "--seed", str(config.seed),
                             "--first-index", other)),
        pack("tiles", "cutting them into tiles", tiles, "--source", "raster", "--images", str(scenes),
             "--tile", str(TILE), "--stride", str(STRIDE), "--bands", "red,green,blue"),
        Step("stats", "map of the tiles, values of their bands", "data_shards",
             ("stats", str(tiles), "--output", str(folder / "stats"))),
        Step("index", "encoding the tiles", "retrieval",
             ("index", "--model", str(model), "--data", str(tiles), "--output", str(folder / "index"))),
        Step("search", f"searching for {WANTED!r}", "retrieval",
             ("search", "--index", str(folder / "index"), "--text", WANTED, "--k", "10", "--format", "geojson",
              "--output", str(folder / "found.geojson"))),
    ]  # fmt: skip


def training_steps(config: DemoConfig, folder: Path) -> list[Step]:
    """Returns the steps that draw small pictures and train the tiny model on their captions."""
    train, test, model = folder / "shards" / "train", folder / "shards" / "test", folder / "model"
    drawn = ("--source", "synthetic", "--seed", str(config.seed), "--size", str(SMALL))
    later = ("--first-index", str(config.train_images))
    return [
        pack("train", f"drawing {config.train_images} pictures with captions", train,
             *drawn, "--count", str(config.train_images)),
        pack("test", f"drawing {config.test_images} others", test, *drawn, "--count", str(config.test_images), *later),
        tokenizer(folder, str(train)),
        Step("model", f"training a tiny model on them, {config.ranks} ranks", "pretrain",
             ("--config", str(HERE / "raster" / "model.yaml"), "--run.dir", str(model), "--run.seed", str(config.seed),
              "--data.shards", str(train), "--evaluation.shards", str(test), *own_tokenizer(folder)), config.ranks),
    ]  # fmt: skip
