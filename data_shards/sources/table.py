"""CSV files: `--source csv`, and the metadata of RS5M, `--source rs5m`.

    filename,caption,label,split                 img_name,text,url,country,month,meta_caption
    airport/12.jpg,"planes, parked",airport,train   0000017.jpg,Aerial view of a port,https://...,spain,6,

Several rows with the same file are captions of one sample. Captions come from one column, or from several that
``caption_field`` names. Then the captions are their texts that are not blank, in the order of ``caption_field``.
Commas, tabs, semicolons or bars separate the columns; the header shows which.
"""

from __future__ import annotations

import codecs
import csv as csv_module
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.sources.kept_columns import KeptColumns
from priorclip.data_shards.sources.names import sample_key
from priorclip.data_shards.sources.record import ImageFile, Missing, Record, keep_split

FILE_COLUMNS = ("filename", "file_name", "file", "filepath", "image", "path", "img_name", "name")
CAPTION_COLUMNS = ("caption", "captions", "raw", "text", "title", "sentence")
LABEL_COLUMNS = ("label", "class", "scene", "category")
SEPARATORS = ",\t;|"  # open_clip's tables have tabs, spreadsheets in many countries semicolons
MAX_FIELD = 1 << 24  # characters; a longer one means that a quotation mark lacks its pair
GEOGRAPHY = ("subset_name", "country", "month", "meta_caption")  # columns of RS5M's metadata that KEY.json keeps


@dataclass(frozen=True)
class Columns:
    """The columns of a table; "" or an empty tuple if the table has no such column."""

    file: str
    captions: tuple[str, ...]
    label: str

    def texts(self, row: Mapping[str, str | None]) -> list[str]:
        """Returns the captions of a row, without blank and repeated ones."""
        texts = [(row.get(name) or "").strip() for name in self.captions]
        return list(dict.fromkeys(text for text in texts if text))


def csv(
    file: str | Path,
    images: str | Path,
    split: str | None = None,
    caption_field: Sequence[str] | None = None,
    extra: Sequence[str] = (),
    kept: KeptColumns | None = None,
) -> list[Record]:
    """Reads a CSV with a header. Rows with the same file are captions of one sample, in their order.

    The other columns of the sample are those of its first row.

    Args:
        file: the CSV
        images: folder of the images; file names are relative to it
        split: keep the rows with this value in the column ``split``; None keeps all
        caption_field: columns with captions; None takes the first column of CAPTION_COLUMNS
        extra: columns that KEY.json keeps, if they exist and are not blank
        kept: further columns that KEY.json keeps, such as place and time. A row with a bad value is left out

    Raises:
        ValueError: there is no column for the file, or none for caption or label, or one of ``kept`` is missing; it
            lists the columns
    """
    path, folder = Path(file), str(images)
    records: dict[str, Record] = {}
    for row, columns in csv_rows(path, caption_field):
        if kept is not None and not records:
            kept.require([each for each in row if each is not None], path)
        name = row[columns.file]
        record = records.get(name)
        if record is None:
            record = Record(sample_key(name), ImageFile(folder, name), source=path.stem)
            record.split = intern(row.get("split") or "") or None
            record.url = row.get("url") or None
            record.extra = {key: intern(row[key]) for key in extra if row.get(key)}
            try:
                record.extra |= kept.facts(row) if kept is not None else {}
            except BadSample as error:
                record.image = Missing(error.reason, f"{path.name}: {error.detail}")
            records[name] = record
        record.captions = record.captions + columns.texts(row)  # unlike +=, a list of the exact size
        record.label = record.label or intern((row.get(columns.label) or "").strip()) or None
    return keep_split(list(records.values()), split, path)


def rs5m(
    file: str | Path,
    images: str | Path,
    split: str | None = None,
    caption_field: Sequence[str] | None = None,
    kept: KeptColumns | None = None,
) -> list[Record]:
    """Records of RS5M's image-only layout: a folder of images and a metadata CSV of the release.

    PUB11's file has ``img_name`` (or ``file_name``), ``text`` (words of the web page), ``url`` and in some rows
    ``country``, ``month`` and ``meta_caption``, a caption made from them. RS3's file has ``subset_name`` (fmow, ben,
    millionaid), a caption by BLIP-2 and the same geography. The default caption is ``caption``, or ``text`` without it.
    The geography goes into KEY.json, so that ``caption_field: meta_caption`` can be streamed too.

    Args and errors: as ``csv``
    """
    return csv(file, images, split, caption_field, GEOGRAPHY, kept)


def csv_rows(path: Path, caption_field: Sequence[str] | None = None) -> Iterator[tuple[dict[str, str], Columns]]:
    """Yields the rows of a CSV with its columns for file, captions and label.

    Bytes that are not UTF-8 become surrogates, so that packing leaves out only that sample and reports it.
    """
    csv_module.field_size_limit(MAX_FIELD)
    try:
        yield from _rows(path, caption_field)
    except UnicodeDecodeError as error:  # of UTF-16, where a damaged byte moves all that follow
        raise ValueError(f"{path} is damaged: {error}. Save it as UTF-8") from error


def _rows(path: Path, caption_field: Sequence[str] | None) -> Iterator[tuple[dict[str, str], Columns]]:
    with open(path, newline="", encoding=encoding_of(path), errors="surrogateescape") as handle:
        separator = find_separator(handle.readline(MAX_FIELD), caption_field)
        handle.seek(0)
        reader = csv_module.DictReader(handle, delimiter=separator)
        try:
            columns = table_columns(path, list(reader.fieldnames or []), caption_field)
            for row in reader:
                if not row.get(columns.file):
                    raise ValueError(f"{path}, line {reader.line_num}: no file name")
                yield row, columns
        except csv_module.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}. Is a quotation mark missing?") from error


def encoding_of(path: Path) -> str:
    """Returns the encoding of a text file by its byte order mark: UTF-16, as Excel writes it, or UTF-8."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def find_separator(header: str, caption_field: Sequence[str] | None = None) -> str:
    """Returns the separator that gives the header the columns that we need; a comma if none does."""
    for separator in SEPARATORS:
        names = next(csv_module.reader([header], delimiter=separator), [])
        texts = set(caption_field) <= set(names) if caption_field else first_of(names, CAPTION_COLUMNS + LABEL_COLUMNS)
        if texts and first_of(names, FILE_COLUMNS):
            return separator
    return SEPARATORS[0]


def table_columns(path: Path, found: list[str], caption_field: Sequence[str] | None) -> Columns:
    """Chooses the columns to use. Raises ValueError, which lists the columns, if one is missing."""
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
            f"{', '.join(found) or 'no header'}. A comma, a tab, a semicolon or a bar may separate columns"
        )
    return columns


def first_of(found: Sequence[str], names: Sequence[str]) -> str:
    """Returns the first of ``names`` among the columns, ignoring case; "" if there is none."""
    lower = {name.strip().lower(): name for name in reversed(found)}
    return next((lower[name] for name in names if name in lower), "")


def label_table(path: str | Path) -> dict[str, str]:
    """Reads a CSV with a file and a label column into a map from file name to label."""
    rows = [(row, columns) for row, columns in csv_rows(Path(path)) if columns.label]
    if not rows:
        raise ValueError(f"{path} has no column with labels ({', '.join(LABEL_COLUMNS)})")
    return {
        row[columns.file]: row[columns.label].strip() for row, columns in rows if (row[columns.label] or "").strip()
    }
