"""A small test set in every form of `--data`, and a random PriorCLIP, exported as training exports it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from priorclip.data_shards import train_tokenizer
from priorclip.data_shards.__main__ import main as data_shards
from priorclip.model import build_model, load_preset, save_pretrained

SCENES = ("harbour", "river", "forest", "stadium")
SIDE = 48


@dataclass(frozen=True)
class TestSet:
    """Paths of the files."""

    __test__ = False

    folder: Path
    json: Path
    images: Path
    shards: Path
    export: Path

    def entries(self) -> list[dict]:
        return json.loads(self.json.read_text())["images"]


def picture(seed: int) -> Image.Image:
    """Blobs of random colours, so that pictures differ strongly."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE + 10, SIDE), Image.Resampling.BICUBIC)


def captions(scene: str, seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    colours, things = ("red", "blue", "white", "grey"), ("ships", "roofs", "roads", "trees", "tanks")
    return [f"a {scene} with {rng.integers(2, 99)} {rng.choice(colours)} {rng.choice(things)}" for _ in range(count)]


def write_karpathy(path: Path, entries: list[dict]) -> Path:
    path.write_text(json.dumps({"dataset": "small", "images": entries}))
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are slower on many threads, above all on a busy machine."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS") if variable is None else os.environ.update(OMP_NUM_THREADS=variable)


@pytest.fixture(scope="session")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> TestSet:
    """24 test images with 1 to 6 captions each, 6 training images. The shards hold the test images in order."""
    folder = tmp_path_factory.mktemp("retrieval")
    entries = []
    for number in range(30):
        scene = SCENES[number % len(SCENES)]
        name = f"{scene}/{scene}_{number}.png"
        (folder / "images" / scene).mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / "images" / name)
        sentences = [{"raw": text} for text in captions(scene, number, 1 + number % 6)]
        entries.append({"filename": name, "split": "train" if number >= 24 else "test", "sentences": sentences})
    karpathy = write_karpathy(folder / "small.json", entries)
    words = ["pack", "--source", "karpathy", "--json", str(karpathy), "--images", str(folder / "images")]
    words += ["--split", "test", "--shuffle", "false", "--shard-size", "10", "--workers", "1"]
    assert data_shards([*words, "--output", str(folder / "shards")]) == 0
    texts = [row["raw"] for entry in entries for row in entry["sentences"]]
    return TestSet(folder, karpathy, folder / "images", folder / "shards", export_model(folder / "export", texts))


def export_model(folder: Path, texts: list[str], seed: int = 0) -> Path:
    """A random `priorclip-tiny` with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts, folder.with_name(f"{folder.name}-tokenizer"), 400, 24)
    config = load_preset("priorclip-tiny")
    config.vision.image_size = config.prior.image_size = 64
    config.text.context_length = 24
    model = build_model(config, vocab_size=len(tokenizer))
    return save_pretrained(
        model.state_dict(), model.config, folder, tokenizer_folder=folder.with_name(f"{folder.name}-tokenizer")
    )
