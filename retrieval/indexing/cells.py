"""The approximate part of an index: cells of similar rows, so that a search compares the rows of a few cells only.

    INDEX/cells.safetensors   "centres" (C, d) float32; "rows" (N,) int64, cell by cell, ascending in a cell;
                              "ends" (C,) int64, end of each cell in "rows"; "queries" (Q, d) float16

    rows    4 9 17 | 0 2 | 5 ...       cell 0 holds the rows 4, 9 and 17
    ends    3        5     ...

    cells.candidates(query, k=10)      the rows of the ``probes`` cells whose centres are most similar to the query

A search computes the scores of these rows exactly, from the index's own embeddings. So a row is missed if its cell is
not looked into, and no score is wrong. This is an inverted file (IVF) without a second copy of the embeddings: Jegou,
Douze, Schmid 2011, "Product quantization for nearest neighbor search". The file is data alone, and its values are
checked, because somebody else may have written the index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from priorclip.common.files import sha256_of
from priorclip.common.untrusted_json import check_object, number, text, whole

CELLS = "cells.safetensors"
LOOKED_AT = 8  # rows for each wanted hit that a search compares at least
BLOCK = 1 << 12  # rows that are compared with all centres at once: 64 MiB at 4,096 centres
MOST = 1 << 40
FIELDS = {
    "probes": whole(MOST, 1),
    "recall_at_10": number(1.0),
    "target": number(1.0),
    "queries": text(40),
    "held_out": whole(MOST),
    "trained_on": whole(MOST),
    "sha256": text(64),
}


@dataclass(frozen=True)
class Cells:
    """The cells of an index of N rows.

    Args:
        centres: (C, d) float32
        rows: (N,) rows, cell by cell
        ends: (C,) the end of each cell in ``rows``
        queries: (Q, d) float16: those with even numbers choose ``probes``, the others are held out for the recall
        about: what index.json says: ``probes``, number of cells that a search looks into; ``recall_at_10``, share of
            the ten best rows that it finds, over the held-out queries; ``target``, the recall that was asked for;
            ``queries``, what they are; ``held_out``, their number; ``trained_on``, rows that the centres are from
    """

    centres: Tensor
    rows: NDArray[np.int64]
    ends: NDArray[np.int64]
    queries: Tensor
    about: dict[str, Any]

    @classmethod
    def of(cls, centres: Tensor, cell: NDArray[np.int64], queries: Tensor, about: dict[str, Any]) -> Cells:
        """Returns cells from the number of the cell of each row (N,)."""
        rows = np.argsort(cell, kind="stable")
        return cls(centres, rows, np.cumsum(np.bincount(cell, minlength=len(centres))), queries, about)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Number of rows in each cell (C,)."""
        return np.diff(self.ends, prepend=0)

    def candidates(self, query: Tensor, k: int) -> NDArray[np.int64]:
        """Returns the rows that a search for k hits compares, in ascending order.

        They are those of ``probes`` cells, or of more if these have fewer than ``LOOKED_AT`` rows for each hit.

        Args:
            query: (d,)
            k: number of hits
        """
        scores = torch.mv(self.centres, query.float())
        near = scores.topk(min(self.about["probes"], len(scores))).indices.numpy()
        wanted = LOOKED_AT * k
        if self.sizes[near].sum() < wanted:
            near = scores.argsort(stable=True, dim=0, descending=True).numpy()
            near = near[: int(np.searchsorted(np.cumsum(self.sizes[near]), wanted)) + 1]
        begins = self.ends - self.sizes
        spans = zip(begins[near].tolist(), self.ends[near].tolist(), strict=True)
        return np.sort(np.concatenate([self.rows[begin:end] for begin, end in spans]))

    def cell_of_rows(self) -> NDArray[np.int64]:
        """Returns the number of the cell of each row (N,)."""
        found = np.empty(len(self.rows), np.int64)
        found[self.rows] = np.repeat(np.arange(len(self.ends)), self.sizes)
        return found

    def with_rows(self, embeddings: Tensor) -> Cells:
        """Returns cells that also have the rows of further embeddings (n, d), which come after the others."""
        more = nearest_centres(self.centres, embeddings)
        return self.of(self.centres, np.concatenate([self.cell_of_rows(), more]), self.queries, self.about)

    def without_rows(self, kept: NDArray[np.int64]) -> Cells:
        """Returns cells of the kept rows only, which are in ascending order and get the numbers from 0 on."""
        return self.of(self.centres, self.cell_of_rows()[kept], self.queries, self.about)

    def save(self, folder: Path) -> Cells:
        """Writes the file, and returns the same cells with its checksum in ``about``."""
        tensors = {"rows": torch.from_numpy(self.rows), "ends": torch.from_numpy(self.ends)}
        save_file({"centres": self.centres, "queries": self.queries, **tensors}, folder / CELLS)
        return replace(self, about=self.about | {"sha256": sha256_of(folder / CELLS)})

    @classmethod
    def load(cls, folder: Path, about: dict[str, Any], count: int, width: int) -> Cells:
        """Opens the cells of an index with ``count`` embeddings of ``width`` values.

        Args:
            about: ``approximate`` in index.json

        Raises ValueError, which names the file and says what to do, if it is missing or damaged.
        """
        path = folder / CELLS
        try:
            if not path.is_file():
                raise ValueError("it is missing, or no file")
            if sha256_of(path) != about["sha256"]:
                raise ValueError("its SHA-256 is not the one in index.json")
            tensors = load_file(path)
            rows, ends = tensors["rows"].numpy(), tensors["ends"].numpy()
            found = cls(tensors["centres"], rows, ends, tensors["queries"], about)
            check_cells(found, count, width)
        except Exception as error:  # safetensors' own error is no subclass of ValueError
            raise ValueError(
                f"{path} cannot be used ({error}): make it again with `retrieval approximate --index {folder}`, or "
                "search with --exact true"
            ) from error
        return found


def check_about(value: Any, where: str) -> None:
    """Checks ``approximate`` of index.json. Raises ValueError, which begins with ``where``."""
    check_object(value, FIELDS, where, others=True)


def check_cells(cells: Cells, count: int, width: int) -> None:
    """Raises ValueError if the arrays are not those of an index of ``count`` embeddings of ``width`` values."""
    centres, rows, ends = cells.centres, cells.rows, cells.ends
    if centres.dtype != torch.float32 or centres.shape != (len(ends), width) or not len(ends):
        raise ValueError("its centres do not fit the index")
    if ends.dtype != np.int64 or ends.ndim != 1 or (cells.sizes < 0).any() or ends[0] < 0 or ends[-1] != count:
        raise ValueError("its cells do not fit the index")
    if rows.dtype != np.int64 or rows.shape != (count,) or rows.min(initial=0) < 0:
        raise ValueError("its rows do not fit the index")
    if rows.max(initial=0) >= max(count, 1) or (np.bincount(rows, minlength=count) != 1).any():
        raise ValueError("its rows are not those of the index")
    if cells.queries.dtype != torch.float16 or cells.queries.ndim != 2 or cells.queries.shape[1] != width:
        raise ValueError("its queries do not fit the index")


def nearest_centres(centres: Tensor, embeddings: Tensor) -> NDArray[np.int64]:
    """Returns the number of the centre with the highest product, for each of the embeddings (n, d)."""
    blocks = [(block.float().nan_to_num_() @ centres.T).argmax(1) for block in embeddings.split(BLOCK)]
    return (torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.int64)).numpy()
