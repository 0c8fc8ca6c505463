"""Damaged, odd and changing tars cost only the samples that they damage (see bad_streams.py)."""

from __future__ import annotations

import itertools
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from bad_streams import (
    CAPTION,
    SIDE,
    colour,
    entry,
    epoch_of,
    indexed,
    sound,
    sound_entries,
    stream,
    tar_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import encoded, picture, rows, write_tar

from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.shard_index import ShardIndex, index_path, scan

pytestmark = pytest.mark.usefixtures("time_limit")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of six sound samples, without indices."""
    place = tmp_path / "shards"
    place.mkdir()
    tar_of(place / "a.tar", sound_entries(range(6)))
    tar_of(place / "b.tar", sound_entries(range(6, 12)))
    return place


@pytest.mark.parametrize("cut", ["header", "data", "all"])
def test_a_cut_tar_with_an_index_counts_each_sample(cut: str, folder: Path, words: object, tmp_path: Path) -> None:
    index = ShardIndex.load(index_path(indexed(folder) / "b.tar"))
    place = int(index.offset[int(index.first[3])])
    os.truncate(folder / "b.tar", {"header": place - 300, "data": place + 10, "all": 0}[cut])
    epoch = epoch_of(folder, words, tmp_path)
    lost = range(6 if cut == "all" else 9, 12)
    assert epoch.reasons == {f"s{number:02d}": "shard is cut short" for number in lost}
    assert epoch.sound() == [f"s{number:02d}" for number in range(lost.start)]


@pytest.mark.parametrize("cut", ["header", "data", "mark"])
def test_a_cut_tar_without_an_index_causes_a_warning(
    cut: str, folder: Path, words: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = scan(folder / "b.tar")
    place = int(index.offset[int(index.first[3])])
    size = (folder / "b.tar").stat().st_size
    os.truncate(folder / "b.tar", {"header": place - 300, "data": place + 10, "mark": size - 1024}[cut])
    epoch = epoch_of(folder, words, tmp_path)
    assert epoch.reasons == ({"s09": "shard is cut short"} if cut == "data" else {})
    assert len(ShardSet(str(folder))) == {"header": 9, "data": 10, "mark": 12}[cut]
    assert "damaged or cut short after" in caplog.text


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_flipped_bytes_of_a_tar_cost_the_samples_they_lie_in(
    words: object, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any bytes of one sample, with or without an index; all other samples arrive unchanged."""
    folder = tmp_path_factory.mktemp("flip")
    form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
    tar = tar_of(folder / "a.tar", sound_entries(range(8), form))
    whole = scan(tar)
    if data.draw(st.booleans()):
        indexed(folder)
    content = bytearray(tar.read_bytes())
    sample = data.draw(st.integers(0, 7))
    first, last = (int(whole.offset[row]) for row in (2 * sample, 2 * sample + 1))
    begin, end = first - 512, last + (int(whole.size[2 * sample + 1]) + 511) // 512 * 512
    for place in data.draw(st.lists(st.integers(begin, end - 1), min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    tar.write_bytes(content)
    # Without hashes, changes of captions, names or pixels without a checksum cannot be detected.
    streams = [stream(folder, words, rank=rank, world_size=2, epochs=3) for rank in range(2)]
    seen = [list(each) for each in streams]
    assert len(seen[0]) == len(seen[1])
    keys = set()
    for batch in itertools.chain(*seen):
        key = streams[0].source.name(int(batch["image_ids"][0]))[1]
        if key in {f"s{n:02d}" for n in range(8) if n != sample}:
            assert (batch["images"][0].numpy() == np.array(colour(int(key[1:]))).reshape(3, 1, 1)).all()
            keys.add(key)
    assert keys == {f"s{n:02d}" for n in range(8) if n != sample}


def test_a_size_of_sixteen_gigabytes_takes_no_memory(words: object, tmp_path: Path) -> None:
    liar = tarfile.TarInfo("liar.jpg")
    liar.size = 16 << 30
    parts = (sound_entries(range(4)), liar.tobuf(), bytes(512), sound_entries(range(4, 8)))
    epoch = epoch_of(tar_of(tmp_path / "a.tar", *parts), words, tmp_path)
    assert epoch.reasons == {"liar": "member is too large"}
    assert len(epoch.sound()) == 8


@pytest.mark.parametrize("size", ["-1", "-9999", "77777777777"])
def test_headers_that_lead_nowhere_end(size: str, words: object, tmp_path: Path) -> None:
    """A negative size makes Python's tarfile go backwards without end."""
    block = bytearray(tarfile.TarInfo("liar.jpg").tobuf())
    value = int(size, 8) if size.isdigit() else int(size)
    block[124:136] = b"\xff" + value.to_bytes(11, "big", signed=True) if value < 0 else size.encode() + b"\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    parts = (sound_entries(range(4)), bytes(block), sound_entries(range(4, 8)))
    epoch = epoch_of(tar_of(tmp_path / "a.tar", *parts), words, tmp_path)
    assert len(epoch.sound()) == 8
    assert set(epoch.reasons) <= {"liar"}


def test_names_links_and_hidden_members(words: object, tmp_path: Path) -> None:
    """Odd names are normal keys; members that are no image or text of a sample disturb no other sample."""
    one, two = sound(0)["s00.png"], CAPTION
    long = "d" * 120 + "/" + "n" * 130
    names = ["./dot/s00", "../up/s00", "/root/s00", "with space/s00", "Flughäfen/s00", "a.b/c/s00", f"{long}/s00"]
    parts = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for name in names:
            place = f"{form}/{name}" if not name.startswith((".", "/")) else f"{name[:-3]}{form}/s00"
            parts += [entry(f"{place}.png", one, form=form), entry(f"{place}.json", two, form=form)]
    hidden = [entry(".DS_Store", b"x"), entry("__MACOSX/._s01.png", b"junk"), entry("README", b"text"),
              entry("folder", kind=tarfile.DIRTYPE), entry("pipe.jpg", kind=tarfile.FIFOTYPE),
              entry("device.jpg", kind=tarfile.CHRTYPE)]  # fmt: skip
    between = [entry("s01.png", sound(1)["s01.png"]), entry("._s01.json", b"junk"), entry("s01.json", two)]
    links = [entry("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), entry("link.json", two),
             entry("hard.jpg", kind=tarfile.LNKTYPE, link="s01.png"), entry("hard.json", two),
             entry("blind.json", two)]  # fmt: skip
    tar = tar_of(tmp_path / "a.tar", *parts, *hidden, *between, *links, sound_entries(range(2, 9)))
    epoch = epoch_of(tar, words, tmp_path)
    assert epoch.reasons == {"link": "no image", "hard": "no image", "blind": "no image"}
    shards = ShardSet(str(tar))
    assert len(shards) == 2 * len(names) + 1 + 3 + 7
    assert f"{tarfile.GNU_FORMAT}/{long}/s00" in {shards.key(n) for n in range(len(shards))}
    assert {shards.key(n) for n in range(len(shards))} == set(epoch.keys) | epoch.reasons.keys()


def test_members_far_apart_are_two_half_samples(words: object, tmp_path: Path) -> None:
    """As in webdataset, only neighbours make a sample. Neither half counts as a whole sample."""
    parts = (entry("far.jpg", encoded(picture(1))), sound_entries(range(4)), entry("far.json", CAPTION))
    tar = tar_of(tmp_path / "a.tar", *parts, sound_entries(range(4, 8)))
    epoch = epoch_of(tar, words, tmp_path)
    assert set(epoch.reasons) == {"far"}
    assert "far" not in epoch.keys
    assert len(epoch.sound()) == 8


def test_two_samples_of_one_key_are_two(words: object, tmp_path: Path) -> None:
    parts = [entry(f"s00.{kind}", data) for kind, data in (("png", sound(0)["s00.png"]), ("json", CAPTION))]
    tar = tar_of(tmp_path / "a.tar", *parts, sound_entries(range(1, 4)), *parts, sound_entries(range(4, 8)))
    assert len(ShardSet(str(tar))) == 9
    assert epoch_of(tar, words, tmp_path).reasons == {}


def test_a_large_foreign_member_between_two_is_not_read(tmp_path: Path) -> None:
    parts = (entry("a.jpg", b"image"), entry("a.lidar", bytes(1 << 24)), entry("a.json", CAPTION))
    shards = ShardSet(str(tar_of(tmp_path / "a.tar", *parts)))
    read: list[int] = []
    plain = os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda file, length, place: read.append(length) or plain(file, length, place))
        assert shards.read(0).image == b"image"
    assert sum(read) < 1 << 16


def test_a_sparse_member_causes_a_warning(words: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GNU tar -S stores only the filled parts, so the bytes at a member's place are not the member."""
    block = bytearray(tarfile.TarInfo("holes.png").tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[483:495] = b"%011o\0" % 4096
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    parts = (sound_entries(range(4)), bytes(block), entry("holes.json", CAPTION), sound_entries(range(4, 8)))
    epoch = epoch_of(tar_of(tmp_path / "a.tar", *parts), words, tmp_path)
    assert epoch.reasons == {"holes": "no image"}
    assert "sparse" in caplog.text


def test_tars_end_to_end_lose_nothing(folder: Path, words: object, tmp_path: Path) -> None:
    joined = tmp_path / "joined.tar"
    joined.write_bytes((folder / "a.tar").read_bytes() + (folder / "b.tar").read_bytes())
    assert len(epoch_of(joined, words, tmp_path).sound()) == 12


def test_a_file_that_is_no_tar_is_named_at_the_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"", b"<html>not found</html>" * 99, bytes(10_240)):
        (folder / "c.tar").write_bytes(data)
        if any(data) or not data:
            with pytest.raises(ValueError, match=r"c\.tar is not an uncompressed tar"):
                ShardSet(str(folder))
        else:
            assert len(ShardSet(str(folder))) == 12  # only an end mark: an empty tar
            assert "c.tar is empty" in caplog.text


def test_the_index_of_another_tar_gives_no_captions_to_wrong_images(
    folder: Path, words: object, tmp_path: Path
) -> None:
    indexed(folder)
    shutil.copy(index_path(folder / "a.tar"), index_path(folder / "b.tar"))
    epoch = epoch_of(folder, words, tmp_path)
    assert set(epoch.reasons.values()) <= {"index does not fit", "shard is cut short"}
    assert {row["shard"] for row in rows(tmp_path / "quarantine.jsonl")} == {str(folder / "b.tar")}
    rest = [row["reason"] for row in rows(tmp_path / "quarantine.jsonl")]
    assert len(rest) == 6


@pytest.mark.parametrize("change", ["vanishes", "shrinks", "cannot be opened"])
def test_a_shard_that_changes_between_epochs(change: str, folder: Path, words: object, tmp_path: Path) -> None:
    indexed(folder)
    whole = (folder / "b.tar").read_bytes()
    streams = [stream(folder, words, tmp_path / "q.jsonl", rank=rank, world_size=2, epochs=3) for rank in range(2)]
    batches = [iter(each) for each in streams]

    def epoch() -> set[str]:
        taken = [[next(part) for _ in range(6)] for part in batches]
        ids = [int(batch["image_ids"][0]) for part in taken for batch in part]
        assert len(ids) == 12
        for each in streams:
            each.source.close()
        return {streams[0].source.key(number) for number in ids}

    assert len(epoch()) == 12
    if change == "vanishes":
        (folder / "b.tar").unlink()
    elif change == "shrinks":
        tar_of(folder / "b.tar", sound_entries(range(20, 22)))
    else:
        (folder / "b.tar").unlink()
        (folder / "b.tar").symlink_to("b.tar")  # an error also for root, who may read everything
    assert epoch() <= {f"s{number:02d}" for number in range(6)}
    found = rows(tmp_path / "q.jsonl")
    expected = {"vanishes": {"shard is missing"}, "shrinks": {"index does not fit", "shard is cut short"}}
    assert {row["reason"] for row in found} <= expected.get(change, {"shard cannot be read"})
    assert len(found) == len({(row["key"], row["reason"]) for row in found}) == 6
    (folder / "b.tar").unlink(missing_ok=True)
    (folder / "b.tar").write_bytes(whole)  # it comes back
    assert len(epoch()) == 12


@pytest.mark.parametrize("bad", [0, 1, 30])
def test_sixty_four_ranks_take_the_same_number_of_steps(bad: int, words: object, tmp_path: Path) -> None:
    """For any distribution of the bad samples: each step has 64 sound images, and no rank ends early."""
    members: dict[str, bytes] = {}
    for number in range(200):
        broken = number % (200 // bad) == 3 if bad else False
        image = encoded(Image.new("RGB", (SIDE, SIDE), colour(number)), "PNG")
        members |= {f"k{number:03d}.png": image[: len(image) // 2 if broken else None], f"k{number:03d}.json": CAPTION}
    tar, book = write_tar(tmp_path / "a.tar", members), tmp_path / "q.jsonl"
    broken_keys = {f"k{number:03d}" for number in range(200) if bad and number % (200 // bad) == 3}
    shards = ShardSet(str(tar))
    config = DataConfig(str(tar), image_size=SIDE, workers=0, max_bad_share=0.3, quarantine=str(book))
    streams = [ShardStream(shards, None, config, global_batch=64, train=False, rank=rank, world_size=64, epochs=3)
               for rank in range(64)]  # fmt: skip
    seen = [list(each) for each in streams]
    assert {len(batches) for batches in seen} == {200 // 64 * 3}
    assert len({str(each.state_dict()) for each in streams}) == 1
    keys = set()
    for batch in itertools.chain(*seen):
        key = shards.key(int(batch["image_ids"][0]))
        assert (batch["images"][0].numpy() == np.array(colour(int(key[1:]))).reshape(3, 1, 1)).all(), key
        keys.add(key)
    assert not keys & broken_keys
    assert {line["key"] for line in rows(book)} == broken_keys  # each of 3 epochs drops 8 samples
    assert bool(sum(each.skipped.total() for each in streams)) == bool(bad)
