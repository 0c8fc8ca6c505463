"""CSV files: `--source csv`, and the metadata of RS5M, `--source rs5m`.

    filename,caption,label,split                 img_name,text,url,country,month,meta_caption
    airport/12.jpg,"planes, parked",airport,train   0000017.jpg,Aerial view of a port,https://...,spain,6,

Several rows of a file are captions of one sample. Captions come from one column or, with ``caption_field``, from
several: a sample's captions are then the texts of these columns that are not blank, in the order the columns are named.
"""

from __future__ import annotations

import csv as csv_module
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern

from priorclip.data_shards.sources.names import sample_key
from priorclip.data_shards.sources.record import ImageFile, Record, keep_split

FILE_COLUMNS = ("filename", "file_name", "file", "filepath", "image", "path", "img_name", "name")
CAPTION_COLUMNS = ("caption", "captions", "raw", "text", "title", "sentence")
LABEL_COLUMNS = ("label", "class", "scene", "category")
GEOGRAPHY = ("subset_name", "country", "month", "meta_caption")  # of RS5M's metadata, kept in KEY.json


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say what; "" and an empty tuple where none does."""

    file: str
    captions: tuple[str, ...]
    label: str

    def texts(self, row: Mapping[str, str | None]) -> list[str]:
        """Captions of a row that are not blank, none twice."""
        texts = [(row.get(name) or "").strip() for name in self.captions]
        return list(dict.fromkeys(text for text in texts if text))


def csv(
    file: str | Path,
    images: str | Path,
    split: str | None = None,
    caption_field: Sequence[str] | None = None,
    extra: Sequence[str] = (),
) -> list[Record]:
    """Records of a CSV with a header; rows of the same file are captions of one sample, in their order.

    Args:
        file: the CSV
        images: folder that its file names are relative to
        split: keep the rows whose column ``split`` says so; None keeps all
        caption_field: columns with captions; None takes the first of CAPTION_COLUMNS that is there
        extra: columns kept in KEY.json, where they are there and not blank

    Raises ValueError that lists the columns found where none names the file, or neither caption nor label is there.
    """
    path, folder = Path(file), str(images)
    records: dict[str, Record] = {}
    for row, columns in csv_rows(path, caption_field):
        name = row[columns.file]
        record = records.get(name)
        if record is None:
            record = Record(sample_key(name), ImageFile(folder, name), source=path.stem)
            record.split = intern(row.get("split") or "") or None
            record.url = row.get("url") or None
            record.extra = {key: intern(row[key]) for key in extra if row.get(key)}
            records[name] = record
        record.captions = record.captions + columns.texts(row)  # unlike +=, a list of the exact size
        record.label = record.label or intern((row.get(columns.label) or "").strip()) or None
    return keep_split(list(records.values()), split, path)


def rs5m(
    file: str | Path, images: str | Path, split: str | None = None, caption_field: Sequence[str] | None = None
) -> list[Record]:
    """Records of RS5M's image-only layout: a folder of images and a metadata CSV of the release.

    PUB11's has ``img_name`` (or ``file_name``), ``text`` (the web page's words), ``url`` and, for some,
    ``country``, ``month`` and ``meta_caption``, a caption made of these; RS3's has ``subset_name`` (fmow, ben,
    millionaid), a caption by BLIP-2 and the same geography. The default caption is ``caption``, else ``text``; the
    geography goes into KEY.json, so that ``caption_field: meta_caption`` can be streamed too.

    Args and errors: as ``csv``
    """
    return csv(file, images, split, caption_field, GEOGRAPHY)


def csv_rows(path: Path, caption_field: Sequence[str] | None = None) -> Iterator[tuple[dict[str, str], Columns]]:
    """Rows of a CSV, and which column is the file, the captions and the label.

    Bytes that are not UTF-8 are kept as surrogates: packing then leaves out that one sample and says why.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as handle:
        reader = csv_module.DictReader(handle)
        try:
            columns = table_columns(path, list(reader.fieldnames or []), caption_field)
            for row in reader:
                if not row.get(columns.file):
                    raise ValueError(f"{path}, line {reader.line_num}: no file name")
                yield row, columns
        except csv_module.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def table_columns(path: Path, found: list[str], caption_field: Sequence[str] | None) -> Columns:
    """The columns to use, of those found. Raises ValueError that lists them."""
    unknown = [name for name in caption_field or () if name not in found]
    if unknown:
        raise ValueError(f"{path} has no column {', '.join(unknown)} (--caption-field); it has: {', '.join(found)}")
    one = first_of(found, CAPTION_COLUMNS)
    captions = tuple(caption_field) if caption_field else (one,) if one else ()
    columns = Columns(first_of(found, FILE_COLUMNS), captions, first_of(found, LABEL_COLUMNS))
    if not columns.file or not (columns.captions or columns.label):
        raise ValueError(
            f"{path} needs a column for the file ({', '.join(FILE_COLUMNS)}) and one for the caption or the label "
            f"({', '.join(CAPTION_COLUMNS + LABEL_COLUMNS)}, or --caption-field); it has: "
            f"{', '.join(found) or 'no header'}"
        )
    return columns


def first_of(found: Sequence[str], names: Sequence[str]) -> str:
    """The first of ``names`` among the columns found, in any case; "" if none is."""
    lower = {name.strip().lower(): name for name in reversed(found)}
    return next((lower[name] for name in names if name in lower), "")


def label_table(path: str | Path) -> dict[str, str]:
    """File name -> label of a CSV with these two columns."""
    rows = [(row, columns) for row, columns in csv_rows(Path(path)) if columns.label]
    if not rows:
        raise ValueError(f"{path} has no column with labels ({', '.join(LABEL_COLUMNS)})")
    return {
        row[columns.file]: row[columns.label].strip() for row, columns in rows if (row[columns.label] or "").strip()
    }
