"""Tars of other programs and the metadata of RS5M as sources."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_data import write_tar
from source_packs import jpeg, packed, reasons, refusal, samples

from priorclip.data_shards import DataConfig, ShardSet, ShardStream
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.sources import (
    rs5m,
    webdataset,
)


def test_rs5m_image_layout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "img").mkdir()
    for number in range(3):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(jpeg(number))
    pub11 = tmp_path / "RS5M_pub11_train.csv"
    pub11.write_text(
        "img_name,text,url,country,month,meta_caption\n"
        '0.jpg,"Aerial view, port",https://h/0.jpg,spain,6,a satellite image of Spain in June\n'
        "1.jpg,A lake,https://h/1.jpg,,,\n"
        "2.jpg, ,https://h/2.jpg,,,\n"
    )
    found = samples(packed(tmp_path, "rs5m", "--csv", pub11, "--images", tmp_path / "img"))
    assert {key: sample.captions for key, sample in found.items()} == {"0": ["Aerial view, port"], "1": ["A lake"]}
    assert reasons(tmp_path) == {"2": "no caption"}
    assert found["0"].info["url"] == "https://h/0.jpg"
    assert found["0"].texts("meta_caption") == ["a satellite image of Spain in June"]
    assert (found["0"].info["country"], "country" in found["1"].info) == ("spain", False)
    both = rs5m(pub11, tmp_path / "img", caption_field=["meta_caption", "text"])
    assert [len(record.captions) for record in both] == [2, 1, 0]
    said = refusal(capsys, tmp_path, "rs5m", "--csv", pub11, "--images", tmp_path, "--caption-field", "blip")
    assert "no column blip" in said
    assert "it has: img_name, text, url, country, month, meta_caption" in said


def rs5m_tars(folder: Path) -> str:
    """Writes tars with RS5M's 128 published names, two samples each. Returns the pattern of all."""
    for split in ("train", "val"):
        for part in ("pub11", "rs3"):
            for shard in range(32):
                name = f"{part}-{split}-{shard:04d}"
                members = {}
                for row in range(2):
                    number = shard * 2 + row
                    members[f"{number:09d}.img_content"] = jpeg(number % 7)
                    members[f"{number:09d}.img_name"] = f"{name}_{row}.jpg".encode()
                    members[f"{number:09d}.caption"] = f"{name} row {row}".encode()
                (folder / split).mkdir(parents=True, exist_ok=True)
                write_tar(folder / split / f"{name}.tar", members)
    return str(folder / "train" / "{pub11,rs3}-train-{0000..0031}.tar")


def test_published_shards_stream_index_resume_and_repack(tmp_path: Path) -> None:
    from priorclip.data_shards import ShardStream, load_tokenizer, train_tokenizer

    train = rs5m_tars(tmp_path / "rs5m")
    val = train.replace("train", "val")
    shards = ShardSet([train, val])
    assert (len(shards.files), len(shards)) == (128, 256)
    assert shards.read(0).captions == ["pub11-train-0000 row 0"]
    assert shards.read(255).captions == ["rs3-val-0031 row 1"]
    plain = ShardSet(train)
    assert main(["index", train, "--workers", "1"]) == 0
    assert Manifest.load(tmp_path / "rs5m/train").samples == 128
    assert not ShardSet(train)._scanned, "the index was not used"

    train_tokenizer(["row 0 1 pub11 rs3 train"], tmp_path / "tokenizer", 300, 12)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), 12)
    config = DataConfig(shards=train, image_size=16, workers=0, block_size=4, window_blocks=4)

    def stream() -> ShardStream:
        return ShardStream(ShardSet(train), tokenizer, config, global_batch=16, rank=0, world_size=1, seed=5, epochs=1)

    whole = [batch["image_ids"].tolist() for batch in stream()]
    assert sorted(index for batch in whole for index in batch) == list(range(128))
    resumed = stream()
    resumed.load_state_dict({**resumed.state_dict(), "samples_seen": 48})
    assert [batch["image_ids"].tolist() for batch in resumed] == whole[3:]

    repacked = packed(tmp_path, "webdataset", "--shards", train, "--shard-size", "50")
    assert repacked.sizes == [50, 50, 28]
    for sample in (0, 77, 127):
        before, after = plain.read(sample), repacked.read(sample)
        assert (after.image, after.captions) == (before.image, before.captions)
        assert after.info["img_name"] == before.info["img_name"]
    assert {repacked.read(i).info["source"] for i in range(0, 128, 16)} == {"pub11", "rs3"}
    assert len({repacked.key(i) for i in range(128)}) == 128


def test_img2dataset_output(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    facts = {"url": "https://h/a.jpg", "key": "000000000", "status": "success", "error_message": None, "width": 1}
    facts |= {"height": 1, "original_width": 900, "original_height": 700, "exif": "{}", "sha256": "0" * 64}
    failed = {**facts, "status": "failed_to_download", "error_message": "HTTP Error 404"}
    write_tar(
        folder / "00000.tar",
        {
            "000000000.jpg": jpeg(1),
            "000000000.txt": b"a port from above",
            "000000000.json": json.dumps({**facts, "caption": "a port from above"}).encode(),
            "000000001.jpg": jpeg(2),
            "000000001.txt": b"lost",
            "000000001.json": json.dumps(failed).encode(),
            "000000002.txt": b"no picture",
            "000000003.jpg": jpeg(3),
            "000000003.txt": b"\xff\xfe",
        },
    )
    table = pyarrow.table({"url": ["a", "b", "c"], "status": ["success", "failed_to_resize", "failed_to_download"]})
    pyarrow.parquet.write_table(table, folder / "00000.parquet")
    found = samples(packed(tmp_path, "webdataset", "--shards", folder))
    assert list(found) == ["000000000"]
    info = found["000000000"].info
    assert (info["captions"], info["url"], info["source"]) == (["a port from above"], "https://h/a.jpg", "laion")
    assert (info["width"], info["height"], info["original_width"], info["exif"]) == (40, 32, 900, "{}")
    assert info["sha256"] != facts["sha256"]
    assert reasons(tmp_path) == {
        "000000001": "not downloaded",
        "000000002": "no image",
        "000000003": "text is not UTF-8",
    }
    assert "00000.parquet: 2 images were not downloaded" in caplog.text


def test_repacking_own_shards_keeps_what_they_say(tmp_path: Path) -> None:
    assert main(f"pack --source synthetic --count 4 --size 32 --workers 1 --output {tmp_path / 'drawn'}".split()) == 0
    before = samples(ShardSet(str(tmp_path / "drawn")))
    after = samples(packed(tmp_path, "webdataset", "--shards", tmp_path / "drawn", "--shard-size", "3"))
    assert {key: (s.image, s.label, s.info) for key, s in after.items()} == {
        key: (s.image, s.label, s.info) for key, s in before.items()
    }
    coarse = webdataset(str(tmp_path / "drawn"), ["coarse_captions"])
    assert [record.captions for record in coarse] == [s.texts("coarse_captions") for s in before.values()]


def test_tars_with_dots_in_keys_and_folders_repack(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.b/c.jpg", jpeg(1)), ("a.b/c.txt", b"deep")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert list(samples(packed(tmp_path, "webdataset", "--shards", path))) == ["a.b/c"]
