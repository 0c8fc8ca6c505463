"""The smallest pretraining: shards of drawn scenes, and the configuration of a run of six steps on two ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from priorclip.data_shards.__main__ import main as data_shards

SIZE, IMAGES, GLOBAL_BATCH, EPOCHS = 48, 48, 16, 2


@dataclass(frozen=True)
class SmallPretraining:
    """Where its shards and tokenizer are."""

    shards: Path
    tokenizer: Path

    def config(self, path: Path, folder: Path) -> Path:
        """Writes the run's YAML, whose run directory is ``folder``, to ``path``."""
        vit = {"img_size": SIZE, "patch_size": 12, "embed_dim": 48, "depth": 1, "num_heads": 3}
        prior = {"channels": [8, 16, 16, 16], "stem_width": 8}
        values = {
            "preset": "priorclip-tiny",
            "tokenizer": str(self.tokenizer),
            "model": {
                "vision": {"name": "vit_tiny_patch16_224", "image_size": SIZE, "kwargs": vit},
                "prior": {"image_size": SIZE, "kwargs": prior},
                "text": {"context_length": 24},
            },
            "data": {"shards": str(self.shards), "image_size": SIZE, "workers": 0},
            "run": {
                "dir": str(folder), "epochs": EPOCHS, "log_every": 1, "progress": False, "deterministic": True,
                "engine": {"zero": "2", "global_batch": GLOBAL_BATCH, "threads": 1, "timeout_minutes": 3},
            },
        }  # fmt: skip
        path.write_text(yaml.safe_dump(values))
        return path


@pytest.fixture(scope="session")
def small_pretraining(tmp_path_factory: pytest.TempPathFactory) -> SmallPretraining:
    folder = tmp_path_factory.mktemp("pretraining")
    shards, tokenizer = folder / "shards", folder / "tokenizer"
    pack = ["pack", "--source", "synthetic", "--size", str(SIZE), "--workers", "1", "--shard-size", "20"]
    assert data_shards([*pack, "--count", str(IMAGES), "--output", str(shards)]) == 0
    words = ["--shards", str(shards), "--output", str(tokenizer), "--vocab-size", "400", "--context-length", "24"]
    assert data_shards(["tokenizer", *words]) == 0
    return SmallPretraining(shards, tokenizer)
