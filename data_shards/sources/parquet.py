"""Parquet files: `--source parquet`, with images inside (Hugging Face's data sets, img2dataset) or as paths.

    image                         struct<bytes, path> as `datasets` writes it, binary, or a string: path below --images
    caption, captions, text, ...  string or list of strings
    label                         string, or integer with names in the Hugging Face metadata of the file

Reading goes one row group at a time: first only the texts, then the images of the group that is being packed. So the
largest row group limits the memory. A record holds (file, row group, row). How far the sizes in a file are believed is
in parquet_limits.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.sources.kept_columns import KeptColumns
from priorclip.data_shards.sources.names import sample_key
from priorclip.data_shards.sources.parquet_limits import Texts, check_rows, damaged, read_images
from priorclip.data_shards.sources.record import ImageFile, Missing, Place, Record
from priorclip.data_shards.sources.table import CAPTION_COLUMNS, FILE_COLUMNS, LABEL_COLUMNS, first_of

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "img_content", "image_bytes", "bytes")
SUCCESS = (None, "success")  # values of img2dataset's column "status" for an image that exists


@dataclass(frozen=True, slots=True)
class Cell:
    """An image in a Parquet file; ``group`` is its row group, which is read as a whole."""

    file: str = field(repr=False)
    column: str
    group: int
    row: int

    @property
    def neighbourhood(self) -> tuple[str, int]:
        """The row group. Records of one group are cheap to read together and expensive to read mixed with others."""
        return self.file, self.group

    def load(self, record: Record) -> Record:
        try:
            value = _images(self.file, self.group, self.column)[self.row].as_py()
        except (OSError, ValueError, IndexError) as error:
            raise BadSample("unreadable file", f"{self.file}, row group {self.group}: {error}") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data or not isinstance(data, bytes):
            raise BadSample("empty image", f"{self.file}, row group {self.group}, row {self.row}")
        return replace(record, image=data)


@dataclass(frozen=True)
class Layout:
    """The columns of a file.

    Args:
        image: of the images or their paths
        inside: the file holds the images
        captions: of the captions
        label: of the scene, or ""
        names: classes of an integer label
        kept: columns that KEY.json keeps
    """

    image: str
    inside: bool
    captions: tuple[str, ...]
    label: str
    names: tuple[str, ...] = ()
    kept: KeptColumns | None = None


@lru_cache(maxsize=2)
def _images(file: str, group: int, column: str) -> Any:
    return read_images(_open(file), group, column)


def _open(file: str | Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet files need pyarrow: pip install 'priorclip-pretraining[parquet]'") from error
    if not Path(file).is_file():
        raise FileNotFoundError(f"no such Parquet file: {file}")
    with damaged(f"{file} is not a Parquet file"):
        opened = pyarrow.parquet.ParquetFile(file)
        check_rows(opened.metadata, Path(file))
        return opened


def parquet_files(spec: str | Path) -> list[Path]:
    """Returns a file, the files of a folder or those of a pattern, sorted by name. Raises FileNotFoundError."""
    path = Path(spec)
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    elif any(letter in str(spec) for letter in "*?["):
        files = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
    else:
        files = [path]
    if not files:
        raise FileNotFoundError(f"no .parquet file: {spec}")
    return files


def parquet(
    spec: str | Path,
    images: str | Path | None = None,
    split: str | None = None,
    image_field: str | None = None,
    caption_field: Sequence[str] | None = None,
    label_field: str | None = None,
    kept: KeptColumns | None = None,
) -> list[Record]:
    """Reads Parquet files.

    Args:
        spec: file, folder or pattern
        images: folder of the images, if the column has paths
        split: keep the rows with this value in the column ``split``; without this column, the files named SPLIT-...
        image_field: column of the images; None takes the first known name, or the only column with image bytes
        caption_field: columns of the captions; None takes the first known name
        label_field: column of the scene; None takes the first known name
        kept: further columns that KEY.json keeps, such as place and time. A row with a bad value is left out

    Raises:
        ValueError: a column is missing; it lists the columns of the file
    """
    records: list[Record] = []
    files = parquet_files(spec)
    for path in files:
        file = _open(path)
        layout = replace(columns_of(file, path, image_field, caption_field, label_field), kept=kept)
        if kept is not None:
            others = [name for name in file.schema_arrow.names if not (layout.inside and name == layout.image)]
            kept.require(others, path)
        if not layout.inside and images is None:
            raise ValueError(f"{path}: the column '{layout.image}' has paths: set --images to the folder of the images")
        if split is not None and "split" not in file.schema_arrow.names and not path.name.startswith(split):
            continue
        stem = path.relative_to(spec).with_suffix("").as_posix() if Path(spec).is_dir() else path.stem
        for number, row in enumerate(_texts(file, path, layout)):
            if split is None or row.get("split", split) == split:
                records.append(_record(path, stem, number, row, layout, images))
    if not records:
        found = ", ".join(path.name for path in files[:5])
        raise ValueError(f"{spec}: no row of the split {split!r} in {len(files)} files ({found})")
    return records


def column_rows(file: Path, needed: Sequence[str], wanted: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yields rows of a Parquet file as dicts, group by group. ``wanted`` columns may be absent."""
    opened = _open(file)
    found = opened.schema_arrow.names
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"{file} has no column {', '.join(missing)}; it has: {', '.join(found)}")
    columns = [*needed, *(name for name in wanted if name in found)]
    texts = Texts(opened, file, columns)
    for group in range(opened.num_row_groups):
        yield from texts.rows(group)


def columns_of(
    file: Any, path: Path, image_field: str | None, caption_field: Sequence[str] | None, label_field: str | None
) -> Layout:
    """Chooses the columns to use. Raises ValueError, which lists the columns of the file, if one is missing."""
    import pyarrow.types as types

    schema = file.schema_arrow
    found = list(schema.names)
    for name in (image_field, *(caption_field or ()), label_field):
        if name is not None and name not in found:
            raise ValueError(f"{path} has no column '{name}'; it has: {', '.join(found)}")

    def inside(name: str) -> bool:
        kind = schema.field(name).type
        return types.is_binary(kind) or types.is_large_binary(kind) or _holds_bytes(kind)

    holding = [name for name in found if inside(name)]
    image = image_field or first_of(found, IMAGE_COLUMNS) or (holding[0] if len(holding) == 1 else "")
    image = image or first_of(found, FILE_COLUMNS)
    one = first_of([name for name in found if name != image], CAPTION_COLUMNS)
    captions = tuple(caption_field) if caption_field else (one,) if one else ()
    label = label_field or first_of(found, LABEL_COLUMNS)
    if not image or not (captions or label):
        raise ValueError(
            f"{path} needs a column with images (--image-field) and one with captions (--caption-field) or labels "
            f"(--label-field); it has: {', '.join(found) or 'none'}"
        )
    names = class_names(schema.metadata or {}, label)
    if label and types.is_integer(schema.field(label).type) and not names:
        raise ValueError(f"{path}: the column '{label}' has numbers, and the metadata of the file have no class names")
    return Layout(image, inside(image), captions, label, names)


def _holds_bytes(kind: Any) -> bool:
    return "bytes" in [kind.field(i).name for i in range(kind.num_fields)] if str(kind).startswith("struct") else False


def class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Returns the class names in the metadata that `datasets` writes; empty if there are none."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _texts(file: Any, path: Path, layout: Layout) -> Iterator[dict[str, Any]]:
    """Yields each row without its image; ``place`` is (row group, row)."""
    extra = ("split", "url", "key", "status", "error_message")
    more = layout.kept.columns if layout.kept else ()
    columns = {*layout.captions, layout.label, *extra, *more} & set(file.schema_arrow.names)
    columns |= set() if layout.inside else {layout.image}
    texts = Texts(file, path, sorted(columns))
    for group in range(file.num_row_groups):
        for number, row in enumerate(texts.rows(group)):
            yield {**row, "place": (group, number)}


def _record(
    path: Path, stem: str, number: int, row: dict[str, Any], layout: Layout, images: str | Path | None
) -> Record:
    place: Place
    key = f"{sample_key(stem + '.x')}/{number:08d}"
    if row.get("status") not in SUCCESS:
        place = Missing("not downloaded", str(row.get("error_message") or row["status"]))
    elif layout.inside:
        place = Cell(str(path), layout.image, *row["place"])
    elif row[layout.image]:
        place = ImageFile(str(images), str(row[layout.image]))
        key = sample_key(place.name)
    else:
        place = Missing("missing file", f"{path}, row {number}: no path")
    texts: list[str] = []
    for name in layout.captions:
        value = row[name]
        texts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    texts = [text.strip() for text in texts if text.strip()]
    split, url = (value if isinstance(value, str) else None for value in (row.get("split"), row.get("url")))
    facts: dict[str, Any] = {}
    try:
        facts = layout.kept.facts(row) if layout.kept else {}
    except BadSample as error:
        place = Missing(error.reason, f"{path.name}, row {number}: {error.detail}")
    return Record(key, place, texts, label_name(path, row, layout), split, path.stem, url, facts)


def label_name(path: Path, row: dict[str, Any], layout: Layout) -> str | None:
    """Returns the scene of a row; None for null and -1, which `datasets` writes for a row without label."""
    value = row.get(layout.label) if layout.label else None
    if value is None or value == -1 or not str(value).strip():
        return None
    if not layout.names or isinstance(value, str):
        return str(value).strip()
    if not 0 <= value < len(layout.names):
        raise ValueError(
            f"{path}: label {value} in the column '{layout.label}' is not one of {len(layout.names)} classes"
        )
    return layout.names[value]
