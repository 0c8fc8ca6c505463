"""How far the sizes in a Parquet file are believed, because a few kilobytes can ask for all memory.

    texts = Texts(file, path, ["caption", "label"])
    for row in texts.rows(0): ...                  # the rows of a row group, a few at a time
    read_images(file, 0, "image")                  # its images, up to MAX_GROUP bytes

A file of 1 kB can say that it has a billion rows, because equal values are counted, not repeated. A page of zeros
shrinks a thousand times. A text of 30 MB that stands once in a dictionary can be the value of every row. So:

    a file has no more rows than bytes
    a row group unpacks to MAX_GROUP bytes of images at most, by what it says and by what it then gives
    the texts of a file are at most TEXTS + RATIO times its bytes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_GROUP = 2 << 30  # bytes of the images of a row group
TEXTS, RATIO = 256 << 20, 100  # texts of a file: bytes, and times its own bytes
AT_ONCE = 1 << 30  # bytes that the rows that are read together could have if each had the largest value
FEWEST, MOST = 4, 1024  # rows that are read together


@contextmanager
def damaged(what: str) -> Iterator[None]:
    """Turns what Arrow raises for a damaged or impossible file into a ValueError that begins with ``what``."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def check_rows(metadata: Any, path: Path) -> None:
    """Raises ValueError if a file says that it has more rows than bytes, or a negative number."""
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    size = path.stat().st_size
    if min(groups, default=0) < 0 or sum(groups) > size:
        raise ValueError(f"{path} of {size} bytes says that it has {sum(groups)} rows, which cannot be")


def said_size(metadata: Any, group: int) -> int:
    """Returns the bytes to which a row group unpacks, as it says.

    Its columns say it too, but pyarrow ends the process when it is asked about a column whose record is damaged.
    """
    return metadata.row_group(group).total_byte_size  # type: ignore[no-any-return]


def read_images(file: Any, group: int, column: str) -> Any:
    """Returns the column of a row group as an Arrow array in pieces.

    Raises:
        ValueError: its images are larger together than MAX_GROUP, or it is damaged
    """
    import pyarrow

    with damaged("it is damaged"):
        said = said_size(file.metadata, group)
        if said > MAX_GROUP:
            refuse_group(said)
        pieces, size = [], 0
        for piece in file.iter_batches(batch_size=1, row_groups=[group], columns=[column], use_threads=False):
            size += piece.nbytes
            if size > MAX_GROUP:
                refuse_group(size)
            pieces.append(piece)
        return pyarrow.Table.from_batches(pieces).column(0)


def refuse_group(size: int) -> None:
    raise ValueError(
        f"its images are {size >> 20} MB or more together, limit {MAX_GROUP >> 20} MB: write it with smaller row groups"
    )


class Texts:
    """The columns of a file other than its images.

    Args:
        file: opened Parquet file
        path: its place
        columns: names; none gives empty rows
    """

    def __init__(self, file: Any, path: Path, columns: Sequence[str]) -> None:
        self.file, self.path, self.columns = file, path, list(columns)
        self.most = TEXTS + RATIO * path.stat().st_size
        self.size = 0  # of the texts so far

    def rows(self, group: int) -> Iterator[dict[str, Any]]:
        """Yields the rows of a row group. Raises ValueError if it is damaged or its texts are too large."""
        if not self.columns:
            yield from ({} for _ in range(self.file.metadata.row_group(group).num_rows))
            return
        with damaged(f"{self.path}, row group {group}, is damaged"):
            together = AT_ONCE // max(1, said_size(self.file.metadata, group))
            for piece in self.file.iter_batches(
                batch_size=min(MOST, max(FEWEST, together)),
                row_groups=[group],
                columns=self.columns,
                use_threads=False,
            ):
                self.size += piece.nbytes
                if self.size > self.most:
                    raise ValueError(
                        f"{self.path} is refused because its texts take more than {self.most >> 20} MB, which is "
                        f"{RATIO} times the size of the file and {TEXTS >> 20} MB"
                    )
                yield from plain_rows(piece)


def plain_rows(piece: Any) -> list[dict[str, Any]]:
    """Returns the rows of a record batch. Bytes that are not UTF-8 become surrogates, as in a CSV.

    Times of nanoseconds, which pandas writes and Python does not have, are cut to microseconds.
    """
    import pyarrow

    for number, item in enumerate(piece.schema):
        if pyarrow.types.is_timestamp(item.type) and item.type.unit == "ns":
            kind = pyarrow.timestamp("us", item.type.tz)
            piece = piece.set_column(number, item.name, piece.column(number).cast(kind, safe=False))
    try:
        return piece.to_pylist()
    except UnicodeDecodeError:
        names = piece.schema.names
        return [{name: plain_value(piece.column(name)[row]) for name in names} for row in range(piece.num_rows)]


def plain_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if hasattr(scalar, "as_buffer"):
            return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        return [plain_value(each) for each in scalar.values] if hasattr(scalar, "values") else None
