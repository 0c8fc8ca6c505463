"""BigEarthNet's Sentinel-2 patches: `--source bigearthnet`.

    v1   S2A_..._87_48/S2A_..._87_48_B02.tif, ..._labels_metadata.json    {"labels": ["Mixed forest", ...], ...}
    v2   BigEarthNet-S2/S2A_.../S2A_..._26_57/S2A_..._26_57_B02.tif, metadata.parquet   patch_id, labels, split, ...

A patch has several land cover labels: ``labels`` in KEY.json. ``label`` is null unless there is exactly one. Reading a
record composes the picture from B04, B03 and B02: reflectance 0 .. ``reflectance_max`` becomes 0 .. 255. Most readers
of this data set use the default, 2000 (land reflects 400 +- 200 of Sentinel-2's 10,000); 4095 keeps all 12 bits and
looks dark.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import open_image
from priorclip.data_shards.sources.annotation_fields import check, read_side_file, take
from priorclip.data_shards.sources.folder import walk_names
from priorclip.data_shards.sources.names import image_path
from priorclip.data_shards.sources.record import Record, keep_split, read_file

RED_GREEN_BLUE = ("B04", "B03", "B02")
REFLECTANCE_MAX = 2000
METADATA = "_labels_metadata.json"
FACTS_V1 = ("acquisition_date", "coordinates", "projection", "tile_source")
FACTS_V2 = ("country", "s1_name", "s2v1_name", "contains_seasonal_snow", "contains_cloud_or_shadow")


@dataclass(frozen=True, slots=True)
class Bands:
    """Three bands of a patch, which become a PNG when they are read.

    Args:
        folder: folder of all patches
        patch: folder of the patch, relative to ``folder``; its files are named PATCH_B04.tif
        reflectance_max: value that becomes white
    """

    folder: str = field(repr=False)
    patch: str
    reflectance_max: int = REFLECTANCE_MAX

    def load(self, record: Record) -> Record:
        base = image_path(Path(self.folder), self.patch)
        bands = [_band(base / f"{base.name}_{band}.tif") for band in RED_GREEN_BLUE]
        if len({band.shape for band in bands}) > 1:
            raise BadSample("bands differ in size", f"{base.name}: {', '.join(str(band.shape) for band in bands)}")
        values = np.stack(bands, axis=-1).astype(np.float32) * (255 / self.reflectance_max)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).save(buffer, "PNG")
        return replace(record, image=buffer.getvalue())


def _band(path: Path) -> np.ndarray:
    with open_image(read_file(path), raw=True) as image:
        band = np.asarray(image)
    if band.ndim != 2:
        raise BadSample("not a single band", f"{path.name} has shape {band.shape}")
    return band


def bigearthnet(
    images: str | Path,
    split: str | None = None,
    metadata: str | Path | None = None,
    reflectance_max: int = REFLECTANCE_MAX,
) -> list[Record]:
    """Reads BigEarthNet: v2 if there is a metadata.parquet, otherwise v1.

    Args:
        images: folder of the patches, or the folder of ``BigEarthNet-S2``
        split: train, validation or test of the Parquet file; v1 has no splits
        metadata: the Parquet file; None looks for IMAGES/metadata.parquet
        reflectance_max: value that becomes white

    Raises:
        FileNotFoundError, ValueError: a folder or file is missing or not of BigEarthNet; the message names it
    """
    if reflectance_max < 1:
        raise ValueError(f"--reflectance-max must be at least 1, not {reflectance_max}")
    root = Path(images)
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist")
    table = Path(metadata) if metadata is not None else root / "metadata.parquet"
    if metadata is not None or table.is_file():
        return keep_split(_version_2(root, table, reflectance_max), split, table)
    if split is not None:
        raise ValueError(f"--split {split}: BigEarthNet v1 has no splits in its folders; v2 has, in metadata.parquet")
    return _version_1(root, reflectance_max)


def _version_1(root: Path, reflectance_max: int) -> list[Record]:
    names = walk_names(root, lambda name: name.endswith(METADATA))
    if not names:
        raise FileNotFoundError(f"neither metadata.parquet (v2) nor PATCH/PATCH{METADATA} (v1) below {root}")
    records = []
    for name in names:
        where = str(root / name)
        content = read_side_file(root / name)
        labels = [check(label, str, f"{where}: a label") for label in take(content, "labels", list, where)]
        facts = {key: content[key] for key in FACTS_V1 if content.get(key)}
        patch = Path(name).parent.as_posix()
        records.append(_record(Bands(str(root), patch, reflectance_max), labels, None, facts))
    return records


def _version_2(root: Path, table: Path, reflectance_max: int) -> list[Record]:
    from priorclip.data_shards.sources.parquet import column_rows

    inner = root / "BigEarthNet-S2"
    root = inner if inner.is_dir() else root
    records = []
    for row in column_rows(table, ("patch_id", "labels"), ("split", *FACTS_V2)):
        patch = str(row["patch_id"])
        tile = patch.rsplit("_", 2)[0]
        facts = {key: row[key] for key in FACTS_V2 if isinstance(row.get(key), str | bool) and row[key]}
        labels = row["labels"] if isinstance(row["labels"], list) else []
        part = row.get("split")
        place = Bands(str(root), f"{tile}/{patch}", reflectance_max)
        names = [label for label in labels if isinstance(label, str)]
        records.append(_record(place, names, part if isinstance(part, str) else None, facts))
    return records


def _record(place: Bands, labels: Iterable[str], split: str | None, facts: dict[str, Any]) -> Record:
    scenes = list(dict.fromkeys(labels))
    extra = {**facts, "labels": scenes} if len(scenes) > 1 else facts
    label = scenes[0] if len(scenes) == 1 else None
    return Record(Path(place.patch).name, place, [], label, split, "bigearthnet", extra=extra)
