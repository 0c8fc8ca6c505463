"""Streams of real tars: pixels, captions, workers, resume, shard specifications."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import SCENES, encoded, picture, records, write_tar
from stream_data import assert_same, config, stream_of, take

from priorclip.data_shards import RecordSet, ShardSet, ShardStream, load_tokenizer


def test_a_batch_is_what_the_docstring_says(packed: Path, tokenizer_folder: Path) -> None:
    stream = stream_of(config(packed), str(tokenizer_folder), world_size=2, rank=1)
    (batch,) = take(stream, 1)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if name != "epoch"}
    assert shapes == {
        "images": ((4, 3, 24, 24), torch.uint8),
        "input_ids": ((4, 12), torch.int64),
        "attention_mask": ((4, 12), torch.int64),
        "labels": ((4,), torch.int64),
        "image_ids": ((4,), torch.int64),
    }
    assert batch["epoch"] == 0
    assert len(stream) == 46 // 8
    words = load_tokenizer(str(tokenizer_folder), 12)
    for row, index in enumerate(batch["image_ids"].tolist()):
        sample = stream.source.read(index)
        assert batch["labels"][row] == sorted(SCENES).index(sample.label)
        assert words.decode(batch["input_ids"][row], skip_special_tokens=True).strip() in sample.captions


def test_an_epoch_has_every_sample_once_over_two_ranks(packed: Path) -> None:
    seen = []
    for rank in range(2):
        stream = stream_of(config(packed), batch=2, world_size=2, rank=rank, epochs=1)
        seen += [index for batch in stream for index in batch["image_ids"].tolist()]
    assert sorted(seen) == list(range(46))


def test_pixels_and_captions_do_not_depend_on_the_world(packed: Path, tokenizer_folder: Path) -> None:
    whole = take(stream_of(config(packed), str(tokenizer_folder)), 7)
    for world in (2, 4):
        ranks = [
            take(stream_of(config(packed), str(tokenizer_folder), world_size=world, rank=rank), 7)
            for rank in range(world)
        ]
        for number, batch in enumerate(whole):
            for name in ("images", "input_ids", "labels", "image_ids"):
                dealt = torch.stack([ranks[i % world][number][name][i // world] for i in range(8)])
                assert torch.equal(dealt, batch[name]), (world, number, name)


@pytest.mark.parametrize(("workers", "method"), [(2, "forkserver"), (4, "fork"), (3, "fork"), (1, "spawn")])
def test_workers_do_not_change_a_bit(packed: Path, tokenizer_folder: Path, workers: int, method: str) -> None:
    alone = stream_of(config(packed), str(tokenizer_folder))
    helped = stream_of(config(packed, workers=workers, start_method=method), str(tokenizer_folder))
    assert_same(take(helped, 7), take(alone, 7))
    assert helped.state_dict() == alone.state_dict()


@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_resume_anywhere_gives_the_same_pixels(packed: Path, tokenizer_folder: Path, stop: int) -> None:
    expected = take(stream_of(config(packed), str(tokenizer_folder)), stop + 3)[stop:]
    first = stream_of(config(packed), str(tokenizer_folder))
    take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert (state["epoch"], state["samples_seen"]) == (stop // 5, stop % 5 * 8)
    resumed = stream_of(config(packed, workers=1 if stop == 4 else 0), str(tokenizer_folder))
    resumed.load_state_dict(state)
    assert_same(take(resumed, 3), expected)
    assert_same(take(first, 3), expected)  # a second iterator continues where the first stopped


def test_augmentation_changes_with_the_epoch_and_can_be_switched_off(packed: Path) -> None:
    def by_image(train: bool) -> dict[int, list[torch.Tensor]]:
        found: dict[int, list[torch.Tensor]] = {}
        for batch in stream_of(config(packed), batch=2, train=train, epochs=2):
            for index, image in zip(batch["image_ids"].tolist(), batch["images"], strict=True):
                found.setdefault(index, []).append(image)
        return found

    assert all(not torch.equal(*pair) for pair in by_image(train=True).values())
    assert all(torch.equal(*pair) for pair in by_image(train=False).values())


def test_records_stream_without_packing(packed: Path) -> None:
    made = RecordSet(records(46))
    shards = ShardSet(str(packed))
    options = {"global_batch": 8, "seed": 5, "train": False}
    direct = take(ShardStream(made, None, config(packed, block_size=100), **options), 5)
    assert made.classes == shards.classes
    for batch in direct:
        for index, label in zip(batch["image_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert shards.classes[label] == shards.read(index).label  # packing keeps the order


def test_coarse_captions_are_a_field_of_their_own(packed: Path, tokenizer_folder: Path) -> None:
    stream = stream_of(config(packed, caption_field="coarse_captions"), str(tokenizer_folder))
    words = load_tokenizer(str(tokenizer_folder), 12)
    (batch,) = take(stream, 1)
    for ids, index in zip(batch["input_ids"], batch["image_ids"].tolist(), strict=True):
        assert words.decode(ids, skip_special_tokens=True).strip() == f"coarse {index}"


def test_rs5m_members_stream_as_published(tmp_path: Path, tokenizer_folder: Path) -> None:
    for shard in range(2):
        members = {}
        for index in range(shard * 6, shard * 6 + 6):
            members[f"pub11_{index}.img_content"] = encoded(picture(index))
            members[f"pub11_{index}.img_name"] = f"laion2b_{index}.jpg".encode()
            members[f"pub11_{index}.caption"] = f"Aerial photo {index}".encode()
        write_tar(tmp_path / f"pub11-train-{shard:04d}.tar", members)
    pattern = str(tmp_path / "pub11-train-{0000..0001}.tar")
    shards = ShardSet(pattern)
    sample = shards.read(7)
    assert (sample.key, sample.captions, sample.label) == ("pub11_7", ["Aerial photo 7"], None)
    assert sample.info["img_name"] == "laion2b_7.jpg"
    batches = take(stream_of(config(pattern), str(tokenizer_folder), batch=4, epochs=1), 9)
    assert sorted(index for batch in batches for index in batch["image_ids"].tolist()) == list(range(12))
    assert {label for batch in batches for label in batch["labels"].tolist()} == {-1}


def test_pickled_members_are_never_loaded(tmp_path: Path) -> None:
    hostile = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    members = {}
    for index in range(4):
        members |= {f"{index}.pyd": hostile, f"{index}.pickle": hostile, f"{index}.jpg": encoded(picture(index))}
        members[f"{index}.caption"] = hostile
    write_tar(tmp_path / "a.tar", members)
    take(stream_of(config(tmp_path / "a.tar"), batch=4), 1)
    assert not (tmp_path / "owned").exists()


def test_labels_without_a_manifest_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"a.jpg": encoded(picture(1)), "a.json": b'{"captions": ["x"], "label": "farm"}'}
    path = write_tar(tmp_path / "a.tar", members)
    stream_of(config(path), batch=1)
    assert "data_shards index" in caplog.text
    caplog.clear()
    stream_of(config(path, classes=["farm"]), batch=1)
    assert not caplog.text


def test_shards_without_a_manifest_and_specifications(packed: Path, tmp_path: Path) -> None:
    for path in packed.glob("*.tar"):
        shutil.copy(path, tmp_path)
    listed = ShardSet(str(packed))
    for spec in (
        str(tmp_path),
        str(tmp_path / "train-{000000..000004}.tar"),
        str(tmp_path / "train-*.tar"),
        [str(path) for path in sorted(tmp_path.glob("*.tar"))],
        f"file://{tmp_path}",
    ):
        scanned = ShardSet(spec)
        assert scanned.sizes == listed.sizes == [10, 10, 10, 10, 6]
        assert scanned.fingerprint == listed.fingerprint
        assert dataclasses.replace(scanned.read(41), shard="") == dataclasses.replace(listed.read(41), shard="")
    with pytest.raises(FileNotFoundError, match="train-000005"):
        ShardSet(str(packed / "train-{000004..000005}.tar"))
    with pytest.raises(ValueError, match="twice"):
        ShardSet([str(packed), str(packed / "train-000000.tar")])
    with pytest.raises(ValueError, match="unbalanced"):
        ShardSet(str(packed / "train-{0000.tar"))


def test_a_compressed_tar_is_refused_with_advice(packed: Path, tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress((packed / "train-000000.tar").read_bytes()))
    with pytest.raises(ValueError, match="gunzip"):
        ShardSet(str(path))


def test_remote_shards_come_through_the_cache(packed: Path, tmp_path: Path) -> None:
    pipe = f"pipe:cat {packed / 'train-000003.tar'}"
    shards = ShardSet([pipe, str(packed / "train-000004.tar")], cache=str(tmp_path))
    assert shards.sizes == [10, 6]
    assert shards.read(2).image == ShardSet(str(packed)).read(32).image
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_labels_follow_the_given_classes(packed: Path) -> None:
    stream = stream_of(config(packed, classes=["beach", "airport"]), batch=46)
    (batch,) = take(stream, 1)
    assert stream.classes == ["beach", "airport"]
    for index, label in zip(batch["image_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert label == {"beach": 0, "airport": 1}.get(stream.source.read(index).label, -1)


def test_a_shard_set_travels_without_its_open_files(packed: Path) -> None:
    import pickle

    shards = ShardSet(str(packed))
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy.files._kept
    assert copy.read(45) == shards.read(45)
    assert np.array_equal(copy._starts, shards._starts)
