"""Compares the tables of a Markdown page with the results that they name in a comment.

    <!-- table: docs/results/rsicd.csv closed -->
    | | mean recall | less no prior | seeds |
    |---|---:|---:|---:|
    | no prior | 22.1 ± 0.3 [20.2, 24.0] |  | 5 |

    problems("docs/evidence.md", text, Path("."))     # ["docs/evidence.md: ... '22.1 ± 0.3' is '22.2 ± 0.3'"]

A page can leave out rows and columns, put them in another order, and set a cell in bold. The heads are those of
``python -m experiments tables``; only the column ``published`` has no figures of ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from priorclip.experiments.collected import LESS, SEEDS, CollectedTable, read_collected
from priorclip.experiments.sweep_table import FIGURES

COMMENT = re.compile(r"^<!-- *table: *(?P<file>\S+) +(?P<table>\S+) *-->$")
BEGINNING = re.compile(r"<!-- *table\b")  # also of a comment with a slip in it
PUBLISHED = "published"


class PageTable(NamedTuple):
    """A table of a page: what its comment names, and its cells."""

    file: str
    table: str
    heads: list[str]
    rows: list[list[str]]


def problems(page: str, text: str, root: Path) -> list[str]:
    """Returns a sentence for each cell that the results do not give, and for each table that they do not have.

    Args:
        page: name of the page for the sentences
        text: of the page
        root: folder that the files in the comments are relative to
    """
    lines = [line.strip() for line in text.splitlines()]
    wrong = [f"not a table's name: {line}" for line in lines if BEGINNING.search(line) and not COMMENT.match(line)]
    for table in page_tables(lines):
        wrong += [f"{table.file} {table.table}: {problem}" for problem in table_problems(table, root)]
    return [f"{page}: {problem}" for problem in wrong]


def page_tables(lines: Sequence[str]) -> list[PageTable]:
    """Returns the tables that follow a comment, directly or after an empty line."""
    found = []
    for place, line in enumerate(lines):
        comment = COMMENT.match(line)
        if comment:
            start = place + 1 + (lines[place + 1 : place + 2] == [""])
            end = start
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            heads, *rows = [cells_of(line) for line in lines[start:end]] or [[]]
            found.append(PageTable(comment["file"], comment["table"], heads[1:], rows[1:]))
    return found


def cells_of(line: str) -> list[str]:
    return [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]


def table_problems(found: PageTable, root: Path) -> list[str]:
    """Returns what is wrong with one table."""
    try:
        tables = read_collected(root / found.file)
    except (OSError, ValueError) as error:
        return [str(error)]
    if found.table not in tables:
        return [f"the file has no such table; its tables are {', '.join(tables)}"]
    table = tables[found.table]
    if not found.rows:
        return ["no table with a row follows the comment"]
    unknown = [head for head in found.heads if head not in known_heads(table)]
    if unknown:
        return [f"unknown column '{head}': it can be {', '.join(known_heads(table))}" for head in unknown]
    if not set(found.heads) & set(FIGURES.values()):
        return ["the table has no column of figures"]
    return [problem for row in found.rows for problem in row_problems(row, found.heads, table)]


def known_heads(table: CollectedTable) -> list[str]:
    return [*FIGURES.values(), *(f"{LESS}{label}" for label in table.labels.values()), SEEDS, PUBLISHED]


def row_problems(cells: Sequence[str], heads: Sequence[str], table: CollectedTable) -> list[str]:
    """Returns what is wrong with one row, whose label is the first cell."""
    label, *values = cells
    names = [row for row, each in table.labels.items() if each == label]
    if len(names) != 1:
        return [f"{len(names)} rows have the label '{label}'; the labels are {', '.join(table.labels.values())}"]
    if len(values) != len(heads):
        return [f"row '{label}' has {len(values)} cells for {len(heads)} columns"]
    right = table.cells(names[0])
    return [
        f"row '{label}', column '{head}': '{value}' should be '{right.get(head, '')}'"
        for head, value in zip(heads, values, strict=True)
        if head != PUBLISHED and value != right.get(head, "")
    ]
