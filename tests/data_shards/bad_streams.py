"""Bad data of every kind, in real files, streamed by two simulated ranks: all sound samples arrive, and nothing else.

Each bad sample is among sound samples. A sound one is an image of one colour, which depends on its key; an odd but
sound image is compared with a reference. After an epoch, both ranks must have taken the same number of full steps, each
row must be the image of its key, all sound samples must have come, and quarantine.jsonl must name each bad one and why.
"""

from __future__ import annotations

import itertools
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from small_data import encoded, rows

from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.config import DataConfig

SIDE, SOUND, EPOCHS, LIMIT_SECONDS = 16, 12, 3, 60


CAPTION = b'{"captions": ["a field"]}'


def colour(number: int) -> tuple[int, int, int]:
    return (number * 67 % 256, number * 101 % 256, number * 151 % 256)


def sound(number: int) -> dict[str, bytes]:
    """Returns the members of a sample of one colour."""
    plain = Image.new("RGB", (SIDE, SIDE), colour(number))
    return {f"s{number:02d}.png": encoded(plain, "PNG"), f"s{number:02d}.json": CAPTION}


def among_sound(members: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the members between SOUND sound samples."""
    parts = [sound(number) for number in range(SOUND)]
    everything: dict[str, bytes] = {}
    for part in (*parts[: SOUND // 2], members, *parts[SOUND // 2 :]):
        everything |= part
    return everything


@dataclass
class Epoch:
    """Samples of two ranks: keys in order, the image of each key, and the reasons in quarantine.jsonl by key."""

    keys: list[str]
    pictures: dict[str, np.ndarray]
    reasons: dict[str, str]

    def sound(self) -> list[str]:
        return sorted({key for key in self.keys if key.rpartition("/")[2].startswith("s")})


def stream(spec: Path | list[str], words: object, book: Path | None = None, **options: object) -> ShardStream:
    shards = str(spec) if isinstance(spec, Path) else spec
    data = {"image_size": SIDE, "workers": 0, "max_bad_share": 1.0, "block_size": 4, "window_blocks": 3}
    ranks = {name: options.pop(name) for name in ("rank", "world_size", "epochs") if name in options}
    config = DataConfig(shards, quarantine=str(book) if book else None, **{**data, **options})  # type: ignore[arg-type]
    return ShardStream(ShardSet(shards), words, config, global_batch=2, train=False, seed=3, **ranks)  # type: ignore[arg-type]


def epoch_of(spec: Path | list[str], words: object, folder: Path, **options: object) -> Epoch:
    """Runs two ranks for EPOCHS epochs; checks that steps are full and equal and that sound colours are right.

    An epoch with an odd number of samples drops one of them.
    """
    book = folder / "quarantine.jsonl"
    streams = [stream(spec, words, book, rank=rank, world_size=2, epochs=EPOCHS, **options) for rank in range(2)]
    batches = [list(each) for each in streams]
    steps = len(streams[0].source) // 2 * EPOCHS
    assert [len(part) for part in batches] == [steps, steps]
    places, pictures = [], {}
    for batch in itertools.chain(*batches):
        assert batch["images"].shape == (1, 3, SIDE, SIDE)
        shard, key = streams[0].source.name(int(batch["image_ids"][0]))
        places.append((shard, key))
        pictures[key] = batch["images"][0].numpy()
        base = key.rpartition("/")[2]
        if base.startswith("s") and base[1:].isdigit():
            assert (pictures[key] == np.array(colour(int(base[1:]))).reshape(3, 1, 1)).all(), key
    found = rows(book)
    assert {reason for each in streams for reason in each.skipped} == {line["reason"] for line in found}
    assert not {(line["shard"], line["key"]) for line in found} & set(places)
    return Epoch([key for _, key in places], pictures, {line["key"]: line["reason"] for line in found})


def entry(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", form: int = tarfile.GNU_FORMAT
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info.tobuf(form) + data + bytes(-len(data) % 512)


def tar_of(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path


def sound_entries(numbers: range, form: int = tarfile.GNU_FORMAT) -> bytes:
    return b"".join(entry(name, data, form=form) for n in numbers for name, data in sound(n).items())


def indexed(folder: Path) -> Path:
    assert main(["index", str(folder), "--workers", "1"]) == 0
    return folder
