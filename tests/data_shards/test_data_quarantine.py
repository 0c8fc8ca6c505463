"""The file of bad samples, and the limit on their number."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bad_streams import (
    LIMIT_SECONDS,
)
from small_data import rows

from priorclip.data_shards import ShardSet, ShardStream, TooManyBadSamples
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.shard_index import ShardIndex
from priorclip.data_shards.stream.quarantine import Quarantine

pytestmark = pytest.mark.usefixtures("time_limit")


def row(number: int, reason: str = "no image") -> dict[str, str]:
    return {"sample": str(number), **listed(number, reason)}


def listed(number: int, reason: str = "no image") -> dict[str, str]:
    return {"shard": "a.tar", "key": f"k{number}\udcff", "reason": reason, "detail": ""}


def test_the_quarantine_holds_a_sample_once_over_epochs_ranks_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "q.jsonl"
    ranks = [Quarantine(str(path)) for _ in range(3)]
    for epoch in range(4):
        for number in range(9):
            ranks[(number + epoch) % 3].add([row(number)], epoch, 99)
    Quarantine(str(path)).add([row(3), row(3), row(4, "empty image")], 0, 99)
    assert rows(path) == [*map(listed, range(9)), listed(4, "empty image")]
    assert sum(rank.skipped["no image"] for rank in ranks) == 36


def test_ranks_append_at_once_and_lines_stay_whole(tmp_path: Path) -> None:
    import multiprocessing

    path = tmp_path / "q.jsonl"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=append_many, args=(str(path), rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT_SECONDS)
        assert process.exitcode == 0
    assert sorted(found["key"] for found in rows(path)) == sorted(f"{r}-{n}" for r in range(3) for n in range(100))


def append_many(path: str, rank: int) -> None:
    book = Quarantine(path)
    for number in range(100):
        book.add(
            [{"sample": str(number), "shard": "s", "key": f"{rank}-{number}", "reason": "r", "detail": "d" * 3000}],
            0,
            999,
        )


def test_a_quarantine_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"data\.quarantine: .*file/q\.jsonl cannot be written"):
        Quarantine(str(tmp_path / "file" / "q.jsonl"))


def test_a_disk_that_fills_up_costs_the_list_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Quarantine(str(tmp_path / "q.jsonl"))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("priorclip.data_shards.stream.quarantine.os.write", full)
    for number in range(3):
        book.add([row(number)], 0, 99)
    assert book.skipped["no image"] == 3
    assert caplog.text.count("bad samples are now counted and not listed") == 1


def test_a_sample_met_again_as_a_replacement_counts_once(tmp_path: Path) -> None:
    book = Quarantine()
    for _ in range(5):
        book.add([row(1)], 0, 1)
    with pytest.raises(TooManyBadSamples, match=r"2 bad samples in epoch 0.*a\.tar \(2\)"):
        book.add([row(2)], 0, 1)


def test_samples_with_one_key_count_each() -> None:
    """A key may stand for several samples of a tar, or for all whose index cannot be read."""
    book = Quarantine()
    book.add([{**row(number), "key": "?"} for number in range(4)], 0, 4)
    with pytest.raises(TooManyBadSamples, match=r"5 bad samples in epoch 0.*a\.tar \(5\)"):
        book.add([{**row(4), "key": "?"}], 0, 4)


def damage_head(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_rows(path: Path) -> None:
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    path.write_bytes(data[:start] + bytes([255]) * (len(data) - start))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lend(path: Path) -> None:
    """The index of another shard."""
    path.write_bytes(path.with_name("train-000000.tar.idx").read_bytes())


def repeat_key(path: Path) -> None:
    """All ten samples have the same key, and the text of the first sample in place of an image."""
    text = next(member for member in ShardIndex.load(path).members(0) if member.extension == "json")
    members = [member for _ in range(10) for member in (replace(text, key="x"), replace(text, key="y"))]
    index = ShardIndex.build(members)
    replace(index, first=index.first[::2], key_end=index.key_end[:10] * 0, key_text=b"").save(path)


@pytest.mark.parametrize("damage", [damage_head, damage_rows, cut, lend, repeat_key])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_index_is_as_many_bad_samples_as_its_shard_has(
    packed: Path, tmp_path: Path, damage: Callable[[Path], object], workers: int
) -> None:
    """10 of 46 samples are unusable: a limit of a tenth stops the run, a limit of a half does not."""
    folder = tmp_path / "shards"
    shutil.copytree(packed, folder)
    damage(folder / "train-000001.tar.idx")
    shards = ShardSet(str(folder))
    assert shards.sizes == [10, 10, 10, 10, 6]

    def stream(share: float) -> ShardStream:
        config = DataConfig(
            shards=str(folder), image_size=16, workers=workers, max_bad_share=share, start_method="fork"
        )
        return ShardStream(shards, None, config, global_batch=5, epochs=2)

    with pytest.raises(TooManyBadSamples, match=r"([5-9]|10) bad samples in epoch 0.*train-000001\.tar"):
        list(stream(0.1))
    assert len(list(stream(0.5))) == 18
