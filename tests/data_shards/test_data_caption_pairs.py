"""data.captions: all: every (image, caption) pair once an epoch, for all worlds, workers and resumes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_server import RemoteServer
from small_data import records, write_tar
from stream_data import assert_same, config, stream_of, take

from priorclip.data_shards import ShardSet, ShardStream, load_tokenizer
from priorclip.data_shards.order.caption_pairs import CaptionPairs
from priorclip.data_shards.order.mixture import MixturePart
from priorclip.data_shards.pack.write_shards import PackPlan, pack

COUNTS = [1, 6, 3, 2, 4, 4]  # captions of images 0, 1, ..., again and again
IMAGES = 22
Pair = tuple[int, int]  # index in the caption, its variant


def captions(index: int) -> list[str]:
    return [f"caption {index} variant {number}" for number in range(COUNTS[index % len(COUNTS)])]


PAIRS = {(image, number) for image in range(IMAGES) for number in range(len(captions(image)))}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 images with 1 to 6 captions, 72 pairs, in 4 shards."""
    folder = tmp_path_factory.mktemp("uneven") / "shards"
    made = [replace(record, captions=captions(index)) for index, record in enumerate(records(IMAGES))]
    pack(made, folder, PackPlan(prefix="train", shard_size=6))
    assert len(PAIRS) == 72
    return folder


def all_captions(shards: Path | str, tokenizer: Path, batch: int = 8, rank: int = 0, world: int = 1, **options: object):
    settings = config(shards, captions="all", **options)
    return stream_of(settings, str(tokenizer), batch=batch, rank=rank, world_size=world)


def pairs_of(batches: list[dict], tokenizer: Path) -> Iterator[tuple[int, Pair]]:
    """Yields the image of each row, and what its caption says."""
    words = load_tokenizer(str(tokenizer), 12)
    for batch in batches:
        for image, ids in zip(batch["image_ids"].tolist(), batch["input_ids"], strict=True):
            _, index, _, variant = words.decode(ids, skip_special_tokens=True).split()
            yield image, (int(index), int(variant))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=8), min_size=1, max_size=6), st.data())
def test_pairs_are_found_as_in_a_list(shards: list[list[int]], data: st.DataObject) -> None:
    counts = [count for shard in shards for count in shard]
    listed = [(image, number) for image, count in enumerate(counts) for number in range(count)]
    pairs = CaptionPairs(counts)
    assert [pairs.locate(pair) for pair in range(len(pairs))] == listed
    assert pairs.images == len(counts)
    with pytest.raises(IndexError):
        pairs.locate(len(listed))
    cut = data.draw(st.integers(0, len(shards)))
    parts = [
        MixturePart([len(shard) for shard in group], name=str(len(group))) for group in (shards[:cut], shards[cut:])
    ]
    found = pairs.parts(parts)
    assert [size for part in found for size in part.sizes] == [sum(shard) for shard in shards]
    assert [part.name for part in found] == [part.name for part in parts]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_pair_comes_once_an_epoch_on_any_number_of_ranks(uneven: Path, tokenizer_folder: Path, world: int) -> None:
    seen: list[list[Pair]] = [[], []]
    for rank in range(world):
        stream = all_captions(uneven, tokenizer_folder, rank=rank, world=world)
        assert len(stream) == 9
        batches = take(stream, 18)
        assert [batch["epoch"] for batch in batches] == [0] * 9 + [1] * 9
        for epoch in range(2):
            rows = list(pairs_of(batches[9 * epoch : 9 * epoch + 9], tokenizer_folder))
            assert all(image == index for image, (index, _) in rows)
            seen[epoch] += [pair for _, pair in rows]
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(PAIRS)
    assert seen[0] != seen[1]


def test_batches_do_not_depend_on_ranks_workers_or_kept_pixels(uneven: Path, tokenizer_folder: Path) -> None:
    whole = take(all_captions(uneven, tokenizer_folder, scale=1.0), 12)
    assert_same(take(all_captions(uneven, tokenizer_folder, scale=1.0, workers=2), 12), whole)
    assert_same(take(all_captions(uneven, tokenizer_folder, scale=1.0, keep_pixels="1MB"), 12), whole)
    ranks = [take(all_captions(uneven, tokenizer_folder, rank=rank, world=4, scale=1.0), 12) for rank in range(4)]
    for number, batch in enumerate(whole):
        for name in ("images", "input_ids", "attention_mask", "labels", "image_ids"):
            dealt = torch.stack([ranks[row % 4][number][name][row // 4] for row in range(8)])
            assert torch.equal(dealt, batch[name])


@pytest.mark.parametrize("stop", [4, 9, 13])
def test_a_resume_continues_in_the_middle_of_an_epoch(uneven: Path, tokenizer_folder: Path, stop: int) -> None:
    first = all_captions(uneven, tokenizer_folder)
    expected = take(first, stop + 6)[stop:]
    stopped = all_captions(uneven, tokenizer_folder, rank=0, world=2)
    take(stopped, stop)
    resumed = all_captions(uneven, tokenizer_folder)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert_same(take(resumed, 6), expected)


def test_the_captions_of_an_image_come_with_different_flips(uneven: Path, tokenizer_folder: Path) -> None:
    batches = take(all_captions(uneven, tokenizer_folder, scale=1.0), 9)
    pictures: dict[int, set[bytes]] = {}
    for batch in batches:
        for image, pixels in zip(batch["image_ids"].tolist(), batch["images"], strict=True):
            pictures.setdefault(image, set()).add(pixels.numpy().tobytes())
    assert sum(map(len, pictures.values())) > 2 * IMAGES


def test_a_weight_counts_passes_over_the_pairs(uneven: Path, packed: Path, tokenizer_folder: Path) -> None:
    """72 pairs once and 3 x 46 pairs twice are 348 places of an epoch."""
    mix = {str(uneven): 1, str(packed): 2}
    settings = replace(config("x", captions="all"), shards=mix)
    stream = stream_of(settings, str(tokenizer_folder), batch=4)
    assert len(stream) == (72 + 2 * 138) // 4
    counts = Counter((image, variant) for image, (_, variant) in pairs_of(take(stream, 87), tokenizer_folder))
    assert counts == Counter(dict.fromkeys(PAIRS, 1)) + Counter(
        {(IMAGES + image, number): 2 for image in range(46) for number in range(3)}
    )


def test_noise_swaps_all_captions_of_its_share_of_images(packed: Path, tokenizer_folder: Path) -> None:
    """Each image of the packed shards has three captions, so no caption is lost or doubled."""
    stream = all_captions(packed, tokenizer_folder, batch=6, caption_noise=0.25)
    rows = list(pairs_of(take(stream, 23), tokenizer_folder))
    assert sorted(pair for _, pair in rows) == [(image, number) for image in range(46) for number in range(3)]
    donors: dict[int, set[int]] = {}
    for image, (index, _) in rows:
        donors.setdefault(image, set()).add(index)
    assert all(len(found) == 1 for found in donors.values())
    assert sum(found != {image} for image, found in donors.items()) == round(0.25 * 46)


def test_an_image_without_captions_is_met_and_reported_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    members = {}
    for index, record in enumerate(records(8)):
        texts = [] if index == 3 else captions(index)
        members[f"{index}.jpg"] = record.image
        members[f"{index}.json"] = json.dumps({"captions": texts}).encode()
    path = write_tar(tmp_path / "a.tar", members)  # type: ignore[arg-type]
    stream = all_captions(path, tokenizer_folder, batch=1, max_bad_share=1.0)
    good = sum(len(captions(index)) for index in range(8) if index != 3)
    assert len(stream) == good + 1
    rows = Counter(pair for _, pair in pairs_of(take(stream, good + 1), tokenizer_folder))
    assert stream.skipped["no caption"] >= 1
    assert len(rows) == good
    assert rows.total() == good + 1  # another pair came in its place


def test_the_limit_of_bad_samples_counts_images(uneven: Path, tokenizer_folder: Path) -> None:
    """5 images are a share of 5 / 22: their pairs must not count as 5 of 72 samples."""
    stream = all_captions(uneven, tokenizer_folder, max_bad_share=0.25)
    assert stream.allowed_bad() == 0.25 * IMAGES
    one = stream_of(config(uneven, max_bad_share=0.25), str(tokenizer_folder))
    assert one.allowed_bad() == 0.25 * IMAGES


def test_other_counts_or_another_mode_refuse_a_resume(uneven: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    def made(folder: str, longer: int) -> ShardStream:
        kept = [replace(record, captions=captions(index)) for index, record in enumerate(records(IMAGES))]
        kept[longer].captions.append("caption 1 variant 9")
        pack(kept, tmp_path / folder, PackPlan(prefix="train", shard_size=6))
        return all_captions(tmp_path / folder, tokenizer_folder)

    one, other = made("one", 1), made("other", 2)
    assert one.source.fingerprint == other.source.fingerprint
    with pytest.raises(ValueError, match="number of their captions"):
        other.load_state_dict(one.state_dict())
    plain = stream_of(config(uneven), str(tokenizer_folder))
    with pytest.raises(ValueError, match="every caption"):
        plain.load_state_dict(all_captions(uneven, tokenizer_folder).state_dict())


def test_what_cannot_work_is_refused(
    packed: Path, server: RemoteServer, tmp_path: Path, tokenizer_folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"data\.captions must be one or all, not 'every'"):
        config(packed, captions="every")
    with pytest.raises(ValueError, match="this training reads no captions"):
        stream_of(config(packed, captions="all"))
    remote = ShardSet(f"{server.url}/train/", cache=str(tmp_path))
    words = load_tokenizer(str(tokenizer_folder), 12)
    with pytest.raises(ValueError, match=r"is remote.*Copy the shards to a local folder"):
        ShardStream(remote, words, config("x", captions="all"), global_batch=4)
