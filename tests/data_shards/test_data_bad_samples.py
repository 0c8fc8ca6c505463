"""Bad samples of a stream are replaced, counted, listed and limited, the same on all ranks and after a resume."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from small_data import encoded, picture, rows, write_tar
from stream_data import assert_same, config, stream_of, take

from priorclip.data_shards import ShardSet, TooManyBadSamples
from priorclip.data_shards.stream.quarantine import allowed_bad_samples


def bomb(side: int) -> bytes:
    """Returns a valid 1-bit PNG of side x side pixels in a few hundred KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    line = bytes(1 + side // 8)
    data = b"".join(squeeze.compress(line * 1000) for _ in range(side // 1000)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good samples and a bad one of each kind, in three tars; the last is cut short."""
    folder = tmp_path_factory.mktemp("damaged")
    good = {}
    for index in range(40):
        good[index] = {
            f"g{index}.jpg": encoded(picture(index)),
            f"g{index}.json": json.dumps({"captions": [f"good {index}"], "label": "beach"}).encode(),
        }
    jpeg = encoded(picture(99))
    caption = b'{"captions": ["x"]}'
    bad = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.json": caption,
        "zero.jpg": b"",
        "zero.json": caption,
        "page.jpg": b"<html></html>",
        "page.json": caption,
        "bomb.png": bomb(40_000),
        "bomb.json": caption,
        "mute.jpg": jpeg,
        "mute.json": b'{"captions": ["  "]}',
        "latin.jpg": jpeg,
        "latin.txt": "Flugh\xe4fen".encode("latin-1"),
        "broken.jpg": jpeg,
        "broken.json": b'{"captions": [',
        "blind.json": caption,
        "alone.jpg": jpeg,
    }
    write_tar(folder / "a.tar", {name: data for index in range(20) for name, data in good[index].items()})
    write_tar(folder / "b.tar", bad)
    last = write_tar(folder / "c.tar", {name: data for index in range(20, 40) for name, data in good[index].items()})
    end = last.read_bytes().index(b"g39.jpg") + 512 + 100  # inside the last image
    os.truncate(last, end)
    return folder


REASONS = {
    "half": "unreadable image",
    "zero": "empty image",
    "page": "not an image",
    "bomb": "too many pixels",
    "mute": "no caption",
    "latin": "text is not UTF-8",
    "broken": "bad json",
    "blind": "no image",
    "alone": "no caption",
    "g39": "no caption",
}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_replaced_counted_and_written_down(
    damaged: Path, tokenizer_folder: Path, tmp_path: Path, workers: int
) -> None:
    book = tmp_path / "runs" / "quarantine.jsonl"
    settings = config(damaged, workers=workers, quarantine=str(book), max_bad_share=0.5)
    whole = take(stream_of(settings, str(tokenizer_folder), batch=7, epochs=1), 99)
    assert [len(batch["image_ids"]) for batch in whole] == [7] * 7  # 49 samples, and none is lost
    found = {row["key"]: row["reason"] for row in rows(book)}
    assert found == {**REASONS, "g39": "shard is cut short"}
    assert {Path(row["shard"]).name for row in rows(book)} == {"b.tar", "c.tar"}
    keys = {ShardSet(str(damaged)).key(index) for batch in whole for index in batch["image_ids"].tolist()}
    assert keys >= {f"g{index}" for index in range(39)}
    assert not keys & REASONS.keys()


def test_bad_samples_do_not_desynchronise_ranks_or_resume(damaged: Path, tokenizer_folder: Path) -> None:
    settings = config(damaged, max_bad_share=1.0)
    whole = stream_of(settings, str(tokenizer_folder), batch=6)
    expected = take(whole, 10)
    ranks = [stream_of(settings, str(tokenizer_folder), batch=6, world_size=2, rank=rank) for rank in range(2)]
    dealt = [take(rank, 10) for rank in ranks]
    for number, batch in enumerate(expected):
        both = torch.stack([dealt[i % 2][number]["images"][i // 2] for i in range(6)])
        assert torch.equal(both, batch["images"])
    assert sum((rank.skipped for rank in ranks), start=type(whole.skipped)()) == whole.skipped
    resumed = stream_of(settings, str(tokenizer_folder), batch=6)
    resumed.load_state_dict({"epoch": 0, "samples_seen": 24})
    assert_same(take(resumed, 6), expected[4:])


def test_too_many_bad_samples_stop_the_run_and_name_the_shard(damaged: Path, tokenizer_folder: Path) -> None:
    stream = stream_of(config(damaged, max_bad_share=0.05), str(tokenizer_folder), batch=7)
    with pytest.raises(TooManyBadSamples, match=r"b\.tar"):
        take(stream, 8)


def test_limit_of_bad_samples_of_one_rank() -> None:
    assert allowed_bad_samples(0.01, 1000, 1) == 10
    assert allowed_bad_samples(0.01, 1000, 10) == 7  # 1, plus three standard deviations, plus three
    assert allowed_bad_samples(0.01, 100, 10) == 1  # never more than for all ranks together
    assert allowed_bad_samples(0, 1000, 8) == 0


def test_a_shard_that_vanishes_is_bad_data_and_not_a_crash(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(packed, folder)
    stream = stream_of(config(folder, max_bad_share=0.5), batch=2)
    batches = iter(stream)
    next(batches)
    stream.source.close()
    (folder / "train-000002.tar").unlink()
    rest = [next(batches) for _ in range(22)]
    assert all(len(batch["image_ids"]) == 2 for batch in rest)
    assert stream.skipped["shard is missing"] >= 8
    with pytest.raises(FileNotFoundError, match="train-000002"):
        ShardSet(str(folder))


def test_hashes_are_checked_on_request(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(packed, folder)
    shards = ShardSet(str(folder))
    tar = folder / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    image = shards.read(13).image
    place = data.index(image) + len(image) - 30  # in the entropy-coded data, so the JPEG is still readable
    data[place] ^= 1
    tar.write_bytes(data)
    quiet = stream_of(config(folder), batch=2, epochs=1)
    take(quiet, 99)
    assert not quiet.skipped
    careful = stream_of(config(folder, check_hashes=True, max_bad_share=1.0), batch=2, epochs=1)
    take(careful, 99)
    assert careful.skipped == {"image differs from its hash": 1}
