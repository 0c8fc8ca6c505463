"""The benchmark: both pipelines read the same captions and tars, and the figures are consistent."""

from __future__ import annotations

import io
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from small_data import encoded, image_folder, picture
from torchvision.transforms import Normalize

from priorclip.data_shards.__main__ import main
from priorclip.data_shards.commands import BenchConfig
from priorclip.data_shards.inspect.bench import (
    MEAN,
    STD,
    clip_tokenizer,
    make_shards,
    normalise,
    open_clip_batches,
    photographs,
)
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources import Record
from priorclip.data_shards.stream.batch_fetcher import tokenize


def test_the_peer_reads_every_batch_of_the_same_tars(tmp_path: Path) -> None:
    config = BenchConfig(count=24, batch=8, image_size=32)
    make_shards(tmp_path / "shards", 64, config)
    assert len(ShardSet(str(tmp_path / "shards"))) == 24
    assert list(open_clip_batches(tmp_path / "shards", 0.9, config)) == [8, 8, 8]


def test_normalising_here_is_torchvisions() -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.allclose(normalise(pixels), Normalize(MEAN, STD)(pixels / 255), atol=1e-6)


def test_our_token_ids_are_open_clips() -> None:
    texts = ["Four white storage tanks, beside a river.", "naïve café: 3 x 4 = 12", "a " * 100, "", "機場"]
    ours = tokenize(clip_tokenizer(), texts)
    theirs = open_clip.get_tokenizer("ViT-B-32")(texts)
    for row, mask, expected in zip(ours["input_ids"], ours["attention_mask"], theirs, strict=True):
        length = int(mask.sum())
        assert row[:length].tolist() == expected[:length].tolist()
        assert not expected[length:].any()  # open_clip pads with 0, transformers with the end token, which is masked


def test_mosaics_are_saved_as_their_photographs_are_or_as_told() -> None:
    photo = Record("a", encoded(picture(1, 256, 256), quality=61, subsampling="4:2:2"), ["text"], "field")
    tables = [
        Image.open(io.BytesIO(made.image)).quantization  # type: ignore[arg-type,attr-defined]
        for quality in (None, 61, 90)
        for made in photographs([photo], 300, 1, quality)
    ]
    assert tables[0] == tables[1] != tables[2]


@pytest.mark.parametrize("photos", [False, True])
def test_the_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture, photos: bool) -> None:
    images = ["--images", str(image_folder(tmp_path / "photos", 9))] if photos else []
    words = ["--count", "16", "--batch", "8", "--rounds", str(1 + photos), "--image_size", "32", "--scales", "[0.5]"]
    output = tmp_path / "bench.json"
    options = ["--sizes", "[64, 300]" if photos else "[64]", "--workers", str(not photos).lower()]
    assert main(["bench", *words, *options, *images, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["side"] for row in rows] == ([64, 300] if photos else [64])
    for row in rows:
        assert row["ours_per_core"] > 0
        assert row["open_clip_per_core"] > 0
        assert row["error_worst"] < 4
        assert ("workers_ratio" in row) != photos
    assert "px" in capsys.readouterr().out


def test_impossible_requests_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--count", "3"])
    assert "does not fill one batch of 64" in capsys.readouterr().err
