"""Streaming real tars: pixels, workers, resume, bad data, the ranks of a process group, SLURM's signals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import SCENES, encoded, picture, records, rows, write_tar

from priorclip.common.ports import free_port
from priorclip.data_shards import RecordSet, ShardSet, ShardStream, TooManyBadSamples, eval_batches, load_tokenizer
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.stream.quarantine import allowed_bad_samples

ROOT = Path(__file__).parents[2]


def config(shards: Path | str, **options: object) -> DataConfig:
    defaults: dict = {"image_size": 24, "workers": 0, "block_size": 4, "window_blocks": 3}
    return DataConfig(str(shards), **{**defaults, **options})


def stream_of(settings: DataConfig, tokenizer: str | None = None, batch: int = 8, **options: object) -> ShardStream:
    words = load_tokenizer(tokenizer, 12) if tokenizer else None
    return ShardStream(ShardSet(settings.shards), words, settings, global_batch=batch, **{"seed": 5, **options})


def take(stream: ShardStream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert type(one[name]) is type(other[name]), name
            assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])), name


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
    assert_same(take(first, 3), expected)  # a second iterator goes on where the first was left


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


def bomb(side: int) -> bytes:
    """A valid 1-bit PNG of side x side, in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    line = bytes(1 + side // 8)
    data = b"".join(squeeze.compress(line * 1000) for _ in range(side // 1000)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good samples and one of each kind of bad one, in three tars, the last cut short."""
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
    assert [len(batch["image_ids"]) for batch in whole] == [7] * 7  # 49 samples, none lost
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


def test_what_one_rank_may_see() -> None:
    assert allowed_bad_samples(0.01, 1000, 1) == 10
    assert allowed_bad_samples(0.01, 1000, 10) == 7  # 1, three standard deviations and three
    assert allowed_bad_samples(0.01, 100, 10) == 1  # never more than all ranks together
    assert allowed_bad_samples(0, 1000, 8) == 0


def test_labels_without_a_manifest_are_remarked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"a.jpg": encoded(picture(1)), "a.json": b'{"captions": ["x"], "label": "farm"}'}
    path = write_tar(tmp_path / "a.tar", members)
    stream_of(config(path), batch=1)
    assert "data_shards index" in caplog.text
    caplog.clear()
    stream_of(config(path, classes=["farm"]), batch=1)
    assert not caplog.text


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
    place = data.index(image) + len(image) - 30  # in the entropy-coded data: still a readable JPEG
    data[place] ^= 1
    tar.write_bytes(data)
    quiet = stream_of(config(folder), batch=2, epochs=1)
    take(quiet, 99)
    assert not quiet.skipped
    careful = stream_of(config(folder, check_hashes=True, max_bad_share=1.0), batch=2, epochs=1)
    take(careful, 99)
    assert careful.skipped == {"image differs from its hash": 1}


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


RANK = """
    import sys, torch
    import torch.distributed as dist
    from priorclip.data_shards import ShardSet, ShardStream
    from priorclip.data_shards.config import DataConfig

    def main():
        rank, folder, port, method = int(sys.argv[1]), *sys.argv[2:]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        dist.all_reduce(torch.ones(100_000))
        config = DataConfig(folder, image_size=24, workers=1, start_method=method)
        stream = ShardStream(ShardSet(folder), None, config, global_batch=4, rank=rank, world_size=2, epochs=2)
        seen = torch.zeros(46, dtype=torch.int64)
        for batch in stream:
            seen[batch["image_ids"]] += 1
            dist.all_reduce(torch.ones(100_000))
        dist.all_reduce(seen)
        print("seen", seen.sum().item(), seen.max().item())
        dist.destroy_process_group()

    if __name__ == "__main__":
        main()
"""


def script(tmp_path: Path, text: str) -> tuple[Path, dict[str, str]]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return path, {**os.environ, "PYTHONPATH": str(ROOT)}


def test_workers_start_beside_a_process_group(packed: Path, tmp_path: Path) -> None:
    path, environment = script(tmp_path, RANK)
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(packed), port, method],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, method in enumerate(("forkserver", "fork"))
    ]
    for process in ranks:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "seen 88 2" in output  # 2 epochs of 11 batches of 4


def alive(group: int) -> list[str]:
    """Command lines of the processes of a group that are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(owner) == group and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


PREEMPTED = """
    import os, signal, sys, threading, time
    sys.path.insert(0, sys.argv[4])  # not PYTHONPATH: the fork server must find the package all the same
    from priorclip.data_shards import ShardSet, ShardStream
    from priorclip.data_shards.config import DataConfig

    warned = []

    def main():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: warned.append(number))
        folder, method = sys.argv[1:3]
        config = DataConfig(folder, image_size=24, workers=2, start_method=method)
        stream = ShardStream(ShardSet(folder), None, config, global_batch=4)
        batches = iter(stream)
        threading.Timer(0.5, os.killpg, (0, signal.SIGUSR1)).start()  # the fork server imports torch just then
        next(batches)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.killpg(0, number)
            time.sleep(0.3)
            for _ in range(30):
                next(batches)
        print("warned", len(warned), flush=True)
        if sys.argv[3] == "raise":
            raise RuntimeError("the iterator is still alive")

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(("method", "end"), [("forkserver", "return"), ("fork", "raise")])
def test_workers_outlive_the_warning_of_a_preemption(packed: Path, tmp_path: Path, method: str, end: str) -> None:
    """SLURM signals the whole process group; the run must still be able to finish its step, and then to exit."""
    path, environment = script(tmp_path, PREEMPTED)
    process = subprocess.Popen(
        [sys.executable, str(path), str(packed), method, end, str(ROOT)],
        cwd=tmp_path,
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "warned 3" in output, errors
    assert process.returncode == (1 if end == "raise" else 0), errors
    ended = time.monotonic()
    while left := alive(process.pid):
        assert time.monotonic() - ended < 60, f"still running: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(packed: Path, workers: int) -> None:
    """Dropout must not depend on how often a stream or an evaluation was started."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    take(stream_of(config(packed, workers=workers)), 2)
    list(eval_batches(ShardSet(str(packed)), None, 8, 23, workers=workers).images())
    assert torch.equal(torch.get_rng_state(), before)


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
    assert not copy._open
    assert copy.read(45) == shards.read(45)
    assert np.array_equal(copy._starts, shards._starts)
