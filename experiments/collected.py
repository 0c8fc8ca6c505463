"""The results of sweeps in two small CSV files, and the Markdown tables that they give.

    collect(["runs/rsicd/closed"], Path("docs/results/rsicd.csv"))
    tables = read_collected(Path("docs/results/rsicd.csv"))
    print("\\n".join(tables["closed"].markdown()))

NAME.csv has a line for each run: table, row, label, seed, recalls in percent, the validation's mean recall, the epoch
whose weights were tested, and the seconds of its training steps. NAME.intervals.csv has the intervals of each row and
of each difference of two rows (intervals.py), because they need the test images, which are too many to keep. A page
that shows a table names its file in a comment before it, and a test compares them digit by digit (page_tables.py):

    <!-- table: docs/results/rsicd.csv closed -->
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from priorclip.common.files import write_text
from priorclip.experiments.experiment import Experiment, load_experiment
from priorclip.experiments.intervals import MAIN, image_intervals, images_of, run_folder
from priorclip.experiments.sweep_table import FIGURES, Results, difference, plus_minus, row_figures, test_of

RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", MAIN, "accuracy")
COLUMNS = ("table", "row", "label", "test", "seed", *RECALLS, "validation_mean_recall", "epoch", "seconds")
BOUNDS = ("table", "row", "less", "low", "high")
LESS, SEEDS = "less ", "seeds"  # heads of columns


@dataclass
class CollectedTable:
    """The runs and intervals of one table.

    Args:
        name: the family of its rows
        labels: by row, in the order of the table
        tests: by row, the test data that the row names itself, "" for that of the data file
        results: figures by row and seed
        intervals: by row and the row that is subtracted, "" for none
    """

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)
    results: Results = field(default_factory=dict)
    intervals: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def cells(self, row: str) -> dict[str, str]:
        """Returns the cell of a row in each possible column, by the head of the column."""
        figures = row_figures(row, self.results, self.intervals)
        shown = {FIGURES[name]: plus_minus(value) for name, value in figures.items()}
        less = {f"{LESS}{label}": self.difference(row, other) for other, label in self.labels.items()}
        return {**shown, **less, SEEDS: str(len(self.results[row]))}

    def difference(self, row: str, other: str) -> str:
        """Returns the difference of two rows that are tested on the same data, or ""."""
        if row == other or self.tests[row] != self.tests[other]:
            return ""
        return plus_minus(difference(row, other, self.results, self.intervals), sign=True)

    def markdown(self, less: Sequence[str] | None = None) -> list[str]:
        """Returns the lines of the table, without columns that are empty.

        Args:
            less: rows that are subtracted from the others; None takes the first row
        Raises:
            ValueError: the table has no such row
        """
        others = list(self.labels)[:1] if less is None else list(less)
        unknown = [row for row in others if row not in self.labels]
        if unknown:
            raise ValueError(f"table '{self.name}' has no row '{unknown[0]}'; its rows are {', '.join(self.labels)}")
        cells = {row: self.cells(row) for row in self.labels}
        heads = [*FIGURES.values(), *(f"{LESS}{self.labels[row]}" for row in others), SEEDS]
        heads = [head for head in heads if any(each.get(head) for each in cells.values())]
        lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
        for row, label in self.labels.items():
            lines.append(f"| {label} | {' | '.join(cells[row].get(head, '') for head in heads)} |")
        return lines


def collect(folders: Iterable[str | Path], output: Path) -> list[str]:
    """Writes the two files from the tables and runs in the folders of sweeps; returns the names of the tables.

    Raises:
        ValueError: a folder has no table, two have one of the same name, or a table is not that of its runs
    """
    runs: list[dict[str, Any]] = []
    bounds: list[dict[str, Any]] = []
    names: list[str] = []
    for path in (path for folder in folders for path in tables_in(Path(folder))):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["family"] in names:
            raise ValueError(
                f"{path}: there are two tables '{table['family']}': give each a file of its own by --output"
            )
        names.append(table["family"])
        own, results, rows = runs_of(table, path)
        runs += own
        for (row, less), (low, high) in image_intervals(images_of(rows, results, path.parent)).items():
            bounds.append({"table": names[-1], "row": row, "less": less, "low": f"{low:.6f}", "high": f"{high:.6f}"})
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(bounds_file(output), to_csv(BOUNDS, bounds))
    write_text(output, to_csv(COLUMNS, runs))
    return names


def bounds_file(path: Path) -> Path:
    return path.with_suffix(".intervals.csv")


def tables_in(folder: Path) -> list[Path]:
    """Returns the JSON files of the families in a sweep's folder. Raises ValueError if there are none."""
    found = [path for path in sorted(folder.glob("*.json")) if "family" in json.loads(path.read_text(encoding="utf-8"))]
    if not found:
        raise ValueError(f"{folder} has no table of a family: name the --output of 'sweep FAMILY' (a study has none)")
    return found


def runs_of(table: Mapping[str, Any], path: Path) -> tuple[list[dict[str, Any]], Results, list[Experiment]]:
    """Returns a line for each run of a table, their figures, and the rows with the labels of the table.

    Raises:
        ValueError: the figures of the runs are not those of the table
    """
    lines, results = [], {}
    rows = [replace(load_experiment(each["name"]), label=each["label"]) for each in table["rows"]]
    for row, each in zip(rows, table["rows"], strict=True):
        reports = {seed: read_report(run_folder(path.parent, row, seed)) for seed in each["seeds"]}
        results[row.name] = {seed: report.get("test") or report["evaluation"] for seed, report in reports.items()}
        known = each["figures"][each["main"]]["runs"]
        for seed, figures in results[row.name].items():
            if not math.isclose(figures.get(each["main"], math.nan), known[str(seed)], abs_tol=1e-6):
                raise ValueError(
                    f"{path}: row {row.name} is not the figure of its run with seed {seed}: run the sweep again. A "
                    "table of cross-validations cannot be collected"
                )
            place = {"table": table["family"], "row": row.name, "label": row.label, "test": str(test_of(row) or "")}
            lines.append({**place, "seed": seed, **run_line(figures, reports[seed])})
    return lines, results, rows


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def run_line(figures: Mapping[str, float], report: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the CSV says of a run beside its place in the table; "" is what its report does not know."""
    validation = report.get("evaluation", {}).get(MAIN) if report.get("test") else None
    epoch = report["epochs"] * report.get("exported_step", report["steps"]) / report["steps"]
    speed = report.get("images_per_second")
    return {
        **{name: f"{figures[name]:.6f}" for name in RECALLS if name in figures},
        "validation_mean_recall": "" if validation is None else f"{validation:.6f}",
        "epoch": f"{epoch:.2f}",
        "seconds": f"{report['samples_seen'] / speed:.0f}" if speed else "",
    }


def to_csv(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def from_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads lines by column. Raises ValueError if the file has other columns."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        if tuple(lines.fieldnames or ()) != tuple(columns):
            raise ValueError(f"{path}: needs the columns {','.join(columns)}, as 'experiments collect' writes them")
        return list(lines)


def read_collected(path: Path) -> dict[str, CollectedTable]:
    """Reads what ``collect`` wrote, by the name of the table. Raises OSError or ValueError for another file."""
    tables: dict[str, CollectedTable] = {}
    for line in from_csv(path, COLUMNS):
        table = tables.setdefault(line["table"], CollectedTable(line["table"]))
        table.labels[line["row"]], table.tests[line["row"]] = line["label"], line["test"]
        figures = {name: float(line[name]) for name in RECALLS if line[name]}
        table.results.setdefault(line["row"], {})[int(line["seed"])] = figures
    for line in from_csv(bounds_file(path), BOUNDS):
        tables[line["table"]].intervals[line["row"], line["less"]] = float(line["low"]), float(line["high"])
    return tables


def named_tables(file: str, names: Sequence[str] | None, less: Sequence[str] | None) -> list[str]:
    """Returns the lines of the tables in a file, each with the comment by which a page names it.

    Raises:
        ValueError: the file has no such table, or a table no such row
    """
    tables = read_collected(Path(file))
    unknown = [name for name in names or () if name not in tables]
    if unknown:
        raise ValueError(f"{file} has no table '{unknown[0]}'; its tables are {', '.join(tables)}")
    lines: list[str] = []
    for name in tables if names is None else names:
        lines += [f"<!-- table: {file} {name} -->", *tables[name].markdown(less), ""]
    return lines
