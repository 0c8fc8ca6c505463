"""Small real data: pictures, folders of JPEGs with scene labels, records, plain tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from priorclip.data_shards.sources import Record

SCENES = ("airport", "beach", "denseresidential")


def picture(index: int, width: int = 72, height: int = 64) -> Image.Image:
    """Returns a smooth colour field, a different one for each index."""
    coarse = np.random.default_rng(index).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_folder(root: Path, count: int) -> Path:
    """Writes ``count`` images ROOT/SCENE/SCENE_N.jpg."""
    for index in range(count):
        scene = SCENES[index % len(SCENES)]
        path = root / scene / f"{scene}_{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(index), quality=92))
    return root


def records(count: int) -> list[Record]:
    """Returns records in memory; each caption holds the index."""
    return [
        Record(
            f"area/{index:05d}",
            encoded(picture(index)),
            [f"caption {index} variant {number}" for number in range(3)],
            SCENES[index % len(SCENES)],
            source="made",
            extra={"coarse_captions": [f"coarse {index}"]},
        )
        for index in range(count)
    ]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Writes a plain tar, as another program would."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
