"""A model of bands reads them from shards in evaluation, index and search; the page shows colours."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_galleries import captions

from priorclip.data_shards import ShardSet, train_tokenizer
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.rasters.band_file import write_bands
from priorclip.data_shards.sources import Record
from priorclip.model import build_model, from_pretrained, load_preset, save_pretrained
from priorclip.retrieval import Encoder, Searcher, build_index
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import IndexConfig

BANDS = ("blue", "green", "red", "nir")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of four bands in shards, and an export that reads near infrared and red of them."""
    folder = tmp_path_factory.mktemp("bands")
    rng, records = np.random.default_rng(0), []
    for number in range(12):
        values = rng.integers(1, 4000, (6, 6, 4)).repeat(12, 0).repeat(12, 1).astype(np.uint16)
        data = write_bands(values, np.ones(values.shape[:2], bool), BANDS)
        records.append(Record(f"tile/{number:02d}", data, captions("river", number, 2), "river"))
    pack(records, folder / "shards", PackPlan(image_format="tiff"))
    tokenizer = train_tokenizer([text for each in records for text in each.captions], folder / "tokenizer", 300, 24)
    torch.manual_seed(0)
    config = load_preset("priorclip-tiny")
    for encoder, bands in ((config.vision, ["nir", "red"]), (config.prior, ["red"])):
        encoder.image_size, encoder.bands = 64, bands
        encoder.mean, encoder.std = [2000.0] * len(bands), [1100.0] * len(bands)
    config.text.context_length = 24
    model = build_model(config, vocab_size=len(tokenizer))
    save_pretrained(model.state_dict(), model.config, folder / "export", tokenizer_folder=folder / "tokenizer")
    return folder


def test_index_and_search_read_the_bands_of_the_export(made: Path, tmp_path: Path) -> None:
    settings = {"model": str(made / "export"), "data": str(made / "shards"), "output": str(tmp_path / "index")}
    index = build_index(IndexConfig(**settings, device="cpu", batch_size=5))
    model, shards = from_pretrained(made / "export"), ShardSet(str(made / "shards"))
    images = [shards.read(number).image for number in range(12)]
    batch = torch.from_numpy(np.stack([eval_transform(data, 64, bands=("nir", "red")) for data in images]))
    with torch.no_grad():
        expected = model(images=batch)["image_features"]
    assert torch.allclose(index.embeddings.float(), expected, atol=2e-3)
    searcher = Searcher(index, Encoder.load(made / "export", "cpu"))
    assert [searcher.by_image(data, 1)[0].row for data in images] == list(range(12))
    painted = searcher.belief(3, 40)
    assert (painted.mode, painted.size) == ("RGB", (40, 40))


def test_evaluation_runs_and_corruptions_are_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(made / "shards"), "--device", "cpu"]
    assert main(["evaluate", "--model", str(made / "export"), *words]) == 0
    assert "mean_recall" in capsys.readouterr().out.replace(" ", "_")
    encoder = Encoder.load(made / "export", "cpu")
    with pytest.raises(ValueError, match="reads measured values of nir, red: belief-truth needs a model of pictures"):
        encoder.require_pictures("belief-truth")
    photo = io.BytesIO()
    Image.new("RGB", (64, 64)).save(photo, "PNG")
    with pytest.raises(ValueError, match="no bands"):
        encoder.embed_images([photo.getvalue()])
