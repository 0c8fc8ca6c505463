"""Evaluation batches: every image and caption once, and as many batches on every rank."""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import encoded, picture, records, write_tar

from priorclip.common import progress
from priorclip.data_shards import Record, RecordSet, ShardSet, eval_batches, load_tokenizer
from priorclip.data_shards.dedupe.identical_images import warn_of_shared_images
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.pack.write_shards import PackPlan, pack


@settings(deadline=None)
@given(st.integers(1, 23), st.integers(1, 5), st.integers(1, 4))
def test_every_image_and_caption_once_and_ranks_in_step(count: int, size: int, world: int) -> None:
    source = RecordSet(records(count))
    found, lengths = [], set()
    for rank in range(world):
        batches = list(eval_batches(source, None, 8, size, rank, world).images())
        lengths.add(len(batches))
        assert all(batch["images"].shape == (size, 3, 8, 8) for batch in batches)
        found += [index for batch in batches for index in batch["index"].tolist()]
    assert len(lengths) == 1
    assert sorted(index for index in found if index >= 0) == list(range(count))


def test_rank_0_shows_the_progress_of_all_ranks(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", progress.__name__)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    tokenizer = load_tokenizer(str(tokenizer_folder), 12)
    for rank in range(3):
        caplog.clear()
        batches = eval_batches(RecordSet(records(23)), tokenizer, 8, 2, rank, 3)
        for _ in chain(batches.images("maps"), batches.texts()):
            time.sleep(0.02)
        lines = [record.getMessage() for record in caplog.records]
        assert bool(lines) == (rank == 0)
        if lines:
            assert any(line.startswith("maps: 6 of 23 (26.1 %), ") for line in lines)
            ends = [line.split(" in ")[0] for line in lines if line.count(" of ") and "(" not in line]
            assert ends == ["maps: 23 of 23", f"captions: {batches.text_count} of {batches.text_count}"]


def test_texts_belong_to_their_images(packed: Path, tokenizer_folder: Path) -> None:
    words = load_tokenizer(str(tokenizer_folder), 12)
    shards = ShardSet(str(packed))
    seen: dict[int, tuple[int, str]] = {}
    for rank in range(3):
        batches = eval_batches(shards, words, 16, 5, rank, 3)
        assert (batches.image_count, batches.text_count) == (46, 138)
        for batch in batches.texts():
            assert batch["input_ids"].shape == (5, 12)
            for ids, text, image in zip(batch["input_ids"], batch["index"].tolist(), batch["image_index"].tolist()):
                if text < 0:
                    assert image == -1
                    continue
                assert text not in seen
                seen[text] = (image, words.decode(ids, skip_special_tokens=True).strip())
    assert sorted(seen) == list(range(138))
    for text, (image, words_found) in seen.items():
        assert batches.text_image[text] == image
        assert words_found == batches.captions[text]
        assert words_found in shards.captions(image)


def test_equal_captions_come_once_and_short_ones_together(tokenizer_folder: Path) -> None:
    """Every distinct caption comes once over all ranks, at its first index; batches hold captions of similar length."""
    texts = [["caption 1", "a caption variant of caption 12"], ["caption 1"], ["caption 2 variant", "caption 1"]]
    source = RecordSet([Record(str(i), encoded(picture(i)), each, "beach") for i, each in enumerate(texts)])
    words = load_tokenizer(str(tokenizer_folder), 12)
    found = []
    for rank in range(2):
        batches = eval_batches(source, words, 16, 1, rank, 2)
        steps = list(batches.texts())
        assert len(steps) == 2  # three captions on two ranks
        found.append([(step["index"].item(), step["image_index"].item()) for step in steps])
    assert found == [[(0, 0), (1, 0)], [(3, 2), (-1, -1)]]
    assert (batches.text_count, len(batches.captions)) == (3, 5)


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_and_labels(packed: Path, workers: int) -> None:
    shards = ShardSet(str(packed))
    batches = eval_batches(shards, None, 20, 7, workers=workers)
    for batch in batches.images():
        for image, index, label in zip(batch["images"], batch["index"].tolist(), batch["labels"].tolist()):
            if index >= 0:
                sample = shards.read(index)
                assert np.array_equal(image, eval_transform(sample.image, 20))
                assert batches.classes[label] == sample.label
            else:
                assert not image.any()
                assert label == -1


def test_records_are_a_source(tokenizer_folder: Path) -> None:
    words = load_tokenizer(str(tokenizer_folder), 12)
    batches = eval_batches(iter(records(4)), words, 16, 4)
    assert batches.text_image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batches.keys() == ["area/00000", "area/00001", "area/00002", "area/00003"]
    assert torch.equal(next(iter(batches.images()))["index"], torch.arange(4))


def test_a_bad_image_is_an_error_unless_left_out(tmp_path: Path) -> None:
    members = {"a.jpg": encoded(picture(1)), "b.jpg": b"nothing", "c.jpg": encoded(picture(2))}
    shards = ShardSet(str(write_tar(tmp_path / "a.tar", members)))
    with pytest.raises(ValueError, match=r"evaluation image b of .*a\.tar"):
        list(eval_batches(shards, None, 8, 2).images())
    left = [index for batch in eval_batches(shards, None, 8, 2, skip_bad=True).images() for index in batch["index"]]
    assert left == [0, -1, 2, -1]


def test_a_sample_without_caption_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    members = {"a.jpg": encoded(picture(1)), "a.txt": b"x", "mute.jpg": encoded(picture(2))}
    shards = ShardSet(str(write_tar(tmp_path / "a.tar", members)))
    with pytest.raises(ValueError, match="evaluation sample mute"):
        eval_batches(shards, load_tokenizer(str(tokenizer_folder), 12), 8, 2)


def test_images_shared_with_training_cause_a_warning(
    packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = ShardSet(str(packed))
    both = [record for record in records(48) if record.key in ("area/00003", "area/00030")]
    test = [Record(f"other/{place}", record.image, ["x"]) for place, record in enumerate(both)]
    new = Record("new", encoded(picture(1000)), ["x"])
    assert pack([*test, new], tmp_path / "test", PackPlan(shard_size=2)).samples == 3
    held_out = ShardSet(str(tmp_path / "test"))
    assert warn_of_shared_images(held_out, held_out) == ["other/0", "other/1", "new"]
    caplog.clear()
    assert warn_of_shared_images(training, held_out) == ["other/0", "other/1"]
    assert "2 of the 3 images" in caplog.text
    assert "other/0, other/1." in caplog.text
    caplog.clear()
    assert warn_of_shared_images(training, held_out, rank=1) == []
    plain = ShardSet(str(write_tar(tmp_path / "plain.tar", {"a.jpg": both[0].image, "a.txt": b"x"})))
    assert warn_of_shared_images(training, plain) == []
    assert not caplog.text
