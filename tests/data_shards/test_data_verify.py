"""verify finds each problem and its place; index and stats read shards of other programs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from remote_server import serving
from small_data import encoded, picture, write_tar

from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.sample import split_name
from priorclip.data_shards.format.shard_index import Member, ShardIndex, scan
from priorclip.data_shards.inspect.sizes import check_sizes
from priorclip.data_shards.inspect.verify import verify_folder


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_sound_shards_verify(shards: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(shards), "--workers", "2"]) == 0
    assert "46 samples checked, 0 problems" in capsys.readouterr().out


def test_sizes_of_local_and_remote_shards(shards: Path, capsys: pytest.CaptureFixture) -> None:
    """Local and remote shards give the same count and bytes; short, empty and lost shards give different problems."""
    with serving(shards) as server:
        here, there = check_sizes(str(shards)), check_sizes(f"{server.url}/")
        whole = sum(path.stat().st_size for path in shards.glob("*.tar"))
        assert (here.count, here.bytes, here.wrong) == (there.count, there.bytes, there.wrong) == (5, whole, 0)
        assert there.digest == check_sizes(f"{server.url}/train-00000{{0..4}}.tar").digest
        assert sum(row.sent for row in server.of(r"\.tar$")) < whole / 10, "a shard was fetched"
        os.truncate(shards / "train-000001.tar", 1024)
        os.truncate(shards / "train-000002.tar", 0)
        (shards / "train-000004.tar").unlink()
        for spec, lost in ((str(shards), "No such file"), (f"{server.url}/", "404")):
            assert main(["verify", spec, "--sizes", "true"]) == 1
            output = capsys.readouterr().out
            assert "train-000001.tar: 1024 bytes, " in output
            assert "train-000002.tar: " in output
            assert re.search(rf"BAD .*train-000004.tar: .*{lost}", output)
            assert "2 shards" in output
            assert "3 with problems" in output
        assert "has no manifest.json" in check_sizes(f"{server.url}/nothing/").problems["the shards"]


def test_a_flipped_bit_names_shard_and_member(shards: Path, capsys: pytest.CaptureFixture) -> None:
    opened = ShardSet(str(shards))
    tar = shards / "train-000002.tar"
    flip(tar, tar.read_bytes().index(opened.read(24).image) + 200)
    assert main(["verify", str(shards), "--workers", "1"]) == 1
    output = capsys.readouterr().out
    assert "BAD train-000002.tar: SHA-256 differs from the manifest" in output
    assert f"BAD train-000002.tar: member {opened.key(24)}.jpg: SHA-256 differs from the index" in output
    assert f"BAD train-000002.tar: member {opened.key(24)}.json: its sha256 is not that of the image" in output
    assert output.count("BAD") == 3


def test_a_truncated_tar_is_found(shards: Path) -> None:
    tar = shards / "train-000004.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    problems, _ = verify_folder(shards)
    assert all(problem.startswith("train-000004.tar") for problem in problems)
    assert any("cut short" in problem for problem in problems)
    assert any("members are lost, the first is area/" in problem for problem in problems)


def test_a_damaged_header_is_found(shards: Path) -> None:
    tar = shards / "train-000001.tar"
    flip(tar, tar.read_bytes().index(b"area/00015.jpg") + 3)  # the header's checksum is wrong now
    problems, _ = verify_folder(shards)
    assert any("damaged or cut short after 15 members" in problem for problem in problems)


def test_missing_and_foreign_files_are_found(shards: Path) -> None:
    (shards / "train-000000.tar").unlink()
    (shards / "train-000003.tar.idx").unlink()
    flip(shards / "train-000001.tar.idx", 400)
    shutil.copy(shards / "train-000002.tar", shards / "other.tar")
    problems, _ = verify_folder(shards)
    assert "train-000000.tar: missing" in problems
    assert "train-000003.tar.idx: missing" in problems
    assert "train-000001.tar.idx: SHA-256 differs from the manifest" in problems
    assert "other.tar: not in the manifest" in problems


def test_an_index_that_lies_is_found(shards: Path) -> None:
    """A wrong offset is found, also if the manifest has the hash of the wrong index."""
    place = shards / "train-000000.tar.idx"
    index = ShardIndex.load(place)
    offsets = index.offset.copy()
    offsets[4] += 512
    digest = ShardIndex(**{**vars(index), "offset": offsets}).save(place)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = digest.hex()
    (shards / "manifest.json").write_text(json.dumps(manifest))
    problems, _ = verify_folder(shards)
    assert len(problems) == 1
    assert "the index says" in problems[0]
    assert "area/00001.json" in problems[0]


SHARDS = [f"train-{number:06d}.tar" for number in range(5)]


@pytest.fixture(scope="module")
def spare(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs shards that a test may change if it repairs them."""
    return Path(shutil.copytree(packed, tmp_path_factory.mktemp("spare") / "shards"))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_change_of_any_file_is_found_and_named(spare: Path, data: st.DataObject) -> None:
    """A flipped bit, a cut or extra bytes in a tar or an .idx: verify names exactly this shard."""
    name = data.draw(st.sampled_from([*SHARDS, *(f"{shard}.idx" for shard in SHARDS)]))
    whole = (spare / name).read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        changed = bytearray(whole)
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        changed = bytearray(whole[:place] if kind == "cut" else whole + bytes(1 + place % 2000))
    (spare / name).write_bytes(changed)
    try:
        problems, _ = verify_folder(spare)
    finally:
        (spare / name).write_bytes(whole)
    assert problems
    assert all(problem.startswith(name.removesuffix(".idx")) for problem in problems), problems
    assert any(problem.startswith(f"{name}: ") for problem in problems), problems


@pytest.mark.parametrize("name", [SHARDS[0], SHARDS[4]])
def test_a_missing_tar_is_the_one_problem(name: str, shards: Path, capsys: pytest.CaptureFixture) -> None:
    (shards / name).unlink()
    assert main(["verify", str(shards), "--workers", "1"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")] == [f"BAD {name}: missing"]


def test_an_extra_tar_is_the_one_problem(shards: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(shards / "train-000005.tar", {"a.jpg": b"x", "a.txt": b"y"})
    assert main(["verify", str(shards), "--workers", "1"]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert found == ["BAD train-000005.tar: not in the manifest"]


def test_swapped_tars_and_indices_are_found(shards: Path) -> None:
    for suffix in ("", ".idx"):
        one, two = shards / f"{SHARDS[0]}{suffix}", shards / f"{SHARDS[1]}{suffix}"
        one.rename(shards / "aside")
        two.rename(one)
        (shards / "aside").rename(two)
        problems, _ = verify_folder(shards)
        for name in (one.name, two.name):  # twice, because a matching pair of another name is not this shard
            assert f"{name}: SHA-256 differs from the manifest" in problems
    assert {problem.split(":")[0].removesuffix(".idx") for problem in problems} == set(SHARDS[:2])


def test_verify_without_a_manifest_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "data_shards index" in capsys.readouterr().err


def test_index_writes_what_pack_writes(shards: Path) -> None:
    packed_manifest = Manifest.load(shards)
    indices = {path.name: path.read_bytes() for path in shards.glob("*.idx")}
    for path in (*shards.glob("*.idx"), shards / "manifest.json"):
        path.unlink()
    assert main(["index", str(shards), "--workers", "1"]) == 0
    assert {path.name: path.read_bytes() for path in shards.glob("*.idx")} == indices
    manifest = Manifest.load(shards)
    for name in ("samples", "captions", "bytes", "classes", "class_counts", "fields", "shards"):
        assert getattr(manifest, name) == getattr(packed_manifest, name), name
    assert verify_folder(shards) == ([], 46)
    assert main(["index", str(shards)]) == 2
    assert main(["index", str(shards), "--overwrite", "--workers", "1"]) == 0


def test_index_of_foreign_tars(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for index in range(5):
        members[f"deep/er.x/{index}.img_content"] = encoded(picture(index))
        members[f"deep/er.x/{index}.caption"] = b"a field"
        members[f"deep/er.x/{index}.cls"] = b"farm\n"
    write_tar(tmp_path / "rs3-train-0000.tar", members)
    assert main(["index", str(tmp_path / "rs3-train-*.tar"), "--workers", "1"]) == 0
    shards = ShardSet(str(tmp_path))
    assert (len(shards), shards.classes) == (5, ["farm"])
    assert shards.key(3) == "deep/er.x/3"
    assert shards.captions(3) == ["a field"]
    assert Manifest.load(tmp_path).captions == 5


def test_verify_counts_the_samples_that_streaming_skips(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Foreign tars can hold what packing refuses. verify has the reasons and numbers of an epoch of the stream."""
    image, text = encoded(picture(1)), json.dumps({"captions": ["a field"]}).encode()
    cut = bytearray(encoded(picture(2), "PNG"))
    cut[len(cut) // 2 :] = b""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    ended = encoded(noise)[:3000] + b"\xff\xd9"  # libjpeg fills the rest with grey, and Pillow says nothing
    samples = {
        **{f"good{number}": {"jpg": encoded(picture(number)), "json": text} for number in range(8)},
        "alone": {"json": text}, "beside": {"json": text}, "empty": {"jpg": b"", "json": text},
        "page": {"jpg": b"<html>not found</html>", "json": text}, "cut": {"png": bytes(cut), "json": text},
        "ended": {"jpg": ended, "json": text},
        "broken": {"jpg": image, "json": b'{"captions": 3}'},
    }  # fmt: skip
    members = {f"{key}.{kind}": data for key, files in samples.items() for kind, data in files.items()}
    write_tar(tmp_path / "s.tar", members)
    assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    config = DataConfig(
        str(tmp_path), image_size=16, workers=0, max_bad_share=1.0, quarantine=str(tmp_path / "bad.jsonl")
    )
    stream = ShardStream(ShardSet(str(tmp_path)), None, config, global_batch=15, epochs=1)
    assert sum(1 for _ in stream) == 1
    skipped = Counter(json.loads(line)["reason"] for line in (tmp_path / "bad.jsonl").read_text().splitlines())

    found = {}
    for words, name in ((["--decode", "true"], "decoded"), ([], "headers")):
        capsys.readouterr()
        assert main(["verify", str(tmp_path), "--workers", "1", *words]) == 1
        lines = re.findall(
            r"BAD s\.tar: streaming skips (\d+) samples: ([^,]+), the first is (\w+)", capsys.readouterr().out
        )
        found[name] = {reason: (int(count), first) for count, reason, first in lines}
    assert found["decoded"] == {
        "no image": (2, "alone"), "empty image": (1, "empty"), "not an image": (1, "page"), "bad json": (1, "broken"),
        "unreadable image": (2, "cut"),
    }  # fmt: skip
    assert {reason: count for reason, (count, _) in found["decoded"].items()} == skipped
    assert found["headers"] == {name: value for name, value in found["decoded"].items() if name != "unreadable image"}


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters=".\0", exclude_categories=["Cs"]), min_size=1, max_size=9),
            st.lists(st.sampled_from(["jpg", "json", "txt", "seg.png"]), min_size=1, max_size=4, unique=True),
        ),
        max_size=20,
        unique_by=lambda pair: pair[0],
    ),
    st.booleans(),
)
def test_index_file_round_trip(tmp_path_factory: pytest.TempPathFactory, made: list, hashed: bool) -> None:
    digest = bytes(range(32)) if hashed else None
    members = [
        Member(key, extension, 512 * number + (1 << 33), number + row, digest)
        for number, (key, extensions) in enumerate(made)
        for row, extension in enumerate(extensions)
    ]
    path = tmp_path_factory.mktemp("index") / "a.tar.idx"
    ShardIndex.build(members).save(path)
    index = ShardIndex.load(path)
    assert len(index) == len(made)
    assert [member for sample in range(len(index)) for member in index.members(sample)] == members


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("x.y/a.seg.PNG", ("x.y/a", "seg.png")),
        ("d/000123.img_content", ("d/000123", "img_content")),
    ],
)
def test_keys_are_cut_as_webdataset_cuts_them(name: str, expected: tuple[str, str]) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    assert split_name(name) == expected == (key, extension.lower())


def test_scan_of_a_truncated_tar_keeps_what_is_there(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = shards / "train-000000.tar"
    whole = scan(tar)
    os.truncate(tar, int(whole.offset[12]) + 10)  # in the fifth image
    cut = scan(tar)
    assert len(cut) == 5
    assert [cut.key(i) for i in range(5)] == [whole.key(i) for i in range(5)]
    assert "cut short" in caplog.text


def test_damaged_index_and_manifest_are_named(shards: Path) -> None:
    (shards / "train-000000.tar.idx").write_bytes(b"not an index")
    with pytest.raises(ValueError, match=r"train-000000\.tar\.idx"):
        ShardIndex.load(shards / "train-000000.tar.idx")
    (shards / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        ShardSet(str(shards))


def test_stats_count_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    members: dict[str, bytes] = {}
    for index in range(8):
        members[f"{index}.png"] = encoded(picture(index % 7, 40, 30), "PNG")
        info = {"captions": ["A red roof", f"Trees number {index}"], "label": "town" if index < 6 else "wood"}
        members[f"{index}.json"] = json.dumps(info).encode()
    members |= {"8.png": encoded(picture(8, 50, 50), "PNG"), "8.json": b'{"captions": [""]}'}
    write_tar(tmp_path / "a.tar", members)
    assert main(["stats", str(tmp_path / "a.tar"), "--output", str(tmp_path / "out"), "--images", "9"]) == 0
    numbers = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert (numbers["samples"], numbers["captions"], numbers["unique_captions"]) == (9, 16, 9)
    assert numbers["caption_words"]["mean"] == 3
    assert numbers["classes"] == {"(none)": 1, "town": 6, "wood": 2}
    assert numbers["image_sizes"] == {"40 x 30": 8, "50 x 50": 1}
    assert numbers["top_words"]["red"] == 8
    assert numbers["words_seen_once"] == 8
    assert numbers["bad"] == {"no caption": 1}
    assert "town" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB"))
    tile = np.asarray(picture(0, 40, 30).crop((5, 0, 35, 30)).resize((176, 176), Image.Resampling.BICUBIC))
    assert np.abs(sheet[6:182, 6:182].astype(int) - tile).mean() < 2


def test_stats_find_duplicates(packed: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(packed, twice)
    assert main(["stats", "--shards", f"['{packed}', '{twice}']", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["exact_duplicates"] == 46
