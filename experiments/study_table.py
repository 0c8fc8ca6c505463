"""The tables of a study: mean recall by level, and the difference to other rows by level, paired by seed.

    write_study(study, {"0": results, "0.4": results}, Path("runs/noise"), note, command)    # STUDY.md, .json, .png

The last line of a table is the figure at the highest level minus the figure at the lowest, paired by seed. In the
first table it is the cost of the noise. In the others it shows whether one row gains on another as noise grows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from priorclip.experiments.study import Study
from priorclip.experiments.sweep_table import FIGURES, Results, main_figure, plus_minus, spread

Runs = dict[int, float]  # by seed


def write_study(
    study: Study,
    results: Mapping[str, Results],
    folder: Path,
    note: str,
    command: str,
    by_part: Mapping[str, Mapping[str, Results]] | None = None,
) -> dict[str, Any]:
    """Writes STUDY.md, STUDY.json and STUDY.png; returns the content of the JSON.

    Args:
        by_part: name of a part of the test images -> level -> results on it, for more tables of the same kind
    """
    done = [run for rows in results.values() for runs in rows.values() for run in runs.values()]
    figure = main_figure(dict(enumerate(done)))
    labels = {row: label for row, label in study.rows.items() if any(rows.get(row) for rows in results.values())}
    table = {
        "study": study.name, "asks": study.asks, "axis": study.axis, "command": command, "note": note,
        "figure": FIGURES[figure], "levels": list(results), "labels": labels,
        **compared(study, labels, results, figure),
        "parts": {part: compared(study, labels, own, figure) for part, own in (by_part or {}).items()},
    }  # fmt: skip
    (folder / f"{study.name}.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (folder / f"{study.name}.md").write_text(markdown(table), encoding="utf-8")
    if labels:
        draw([table], folder / f"{study.name}.png")
    return table


def compared(study: Study, labels: Mapping[str, str], results: Mapping[str, Results], figure: str) -> dict[str, Any]:
    """Returns a figure of all rows by level, and its differences to the rows of ``against``."""
    found = {
        row: {level: {seed: run[figure] for seed, run in rows[row].items()} for level, rows in results.items()}
        for row in labels
    }
    return {
        "rows": {row: summarize_levels(runs) for row, runs in found.items()},
        "against": {
            other: {row: summarize_levels(differences(found[row], found[other])) for row in rows_after(other, labels)}
            for other in study.against if other in labels
        },
    }  # fmt: skip


def rows_after(row: str, labels: Mapping[str, str]) -> list[str]:
    """Returns the rows that stand below a row in the table."""
    names = list(labels)
    return names[names.index(row) + 1 :]


def differences(runs: Mapping[str, Runs], other: Mapping[str, Runs]) -> dict[str, Runs]:
    """Returns the differences of the runs with the same level and seed."""
    return {
        level: {seed: value - other[level][seed] for seed, value in each.items() if seed in other[level]}
        for level, each in runs.items()
    }


def summarize_levels(runs: Mapping[str, Runs]) -> dict[str, Any]:
    """Returns mean, spread, count and runs by level, and as ``change`` those of the last level minus the first."""
    first, last = next(iter(runs)), list(runs)[-1]
    change = {seed: value - runs[first][seed] for seed, value in runs[last].items() if seed in runs[first]}
    return {level: {**spread(list(each.values())), "runs": each} for level, each in runs.items() if each} | (
        {"change": {**spread(list(change.values())), "runs": change}} if change and first != last else {}
    )


def markdown(table: Mapping[str, Any]) -> str:
    """Returns the tables as Markdown."""
    lines = [f"# {table['study']}", "", f"`{table['command']}`", "", table["asks"], ""]
    if table["note"]:
        lines += [table["note"], ""]
    for part, found in {"": table, **table["parts"]}.items():
        of = f"{part}, " if part else ""
        lines += table_lines(table, found["rows"], f"{of}{table['axis']}")
        for other, rows in found["against"].items():
            lines += table_lines(table, rows, f"{of}less '{table['labels'][other]}'", sign=True) if rows else []
    lines += [
        f"{table['figure']} in percent: mean and standard deviation over the seeds, and the number of seeds.",
        "Differences are paired by seed; in brackets is the number of seeds in which the difference is above zero.",
    ]
    return "\n".join(lines) + "\n"


def table_lines(table: Mapping[str, Any], rows: Mapping[str, Any], title: str, sign: bool = False) -> list[str]:
    """Returns the lines of one table, with an empty line at the end."""
    levels = table["levels"]
    lines = [f"| {title} | {' | '.join(table['labels'][row] for row in rows)} |", f"|---|{'---:|' * len(rows)}"]
    lines += [f"| {level} | {' | '.join(cell(row.get(level), sign) for row in rows.values())} |" for level in levels]
    if len(levels) > 1:
        changes = " | ".join(cell(row.get("change"), sign=True) for row in rows.values())
        lines.append(f"| {levels[-1]} less {levels[0]} | {changes} |")
    return [*lines, ""]


def cell(value: Mapping[str, Any] | None, sign: bool) -> str:
    """Returns a figure with its number of seeds; with ``sign``, a difference and how many seeds are above zero."""
    if value is None:
        return ""
    above = f"{sum(each > 0 for each in value['runs'].values())}/" if sign else ""
    return f"{plus_minus(dict(value), sign)} ({above}{value['count']})"


def draw(tables: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws one column for each study: the figure, and below it the difference to the first row of ``against``."""
    from matplotlib.figure import Figure

    width = max(5.0, *(0.9 * len(table["levels"]) for table in tables))  # a level can be a word
    figure = Figure(figsize=(width * len(tables), 7), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(tables), sharex="col", sharey="row", squeeze=False)
    for (above, below), table in zip(axes.T, tables, strict=True):
        draw_lines(above, table, table["rows"])
        for other, rows in list(table["against"].items())[:1]:
            draw_lines(below, table, rows)
            below.axhline(0, color="0.6", linewidth=0.8)
            below.set_ylabel(f"less '{table['labels'][other]}', seed by seed")
        below.set_xlabel(table["axis"])
    axes[0, 0].set_ylabel(f"{tables[0]['figure']}, %")
    axes[0, 0].legend()
    figure.savefig(path, metadata={"Software": None})


def draw_lines(axes: Any, table: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """Draws one line for each row, with the row's colour in all plots of the study; bars are standard deviations."""
    levels, names = table["levels"], list(table["labels"])
    for name, row in rows.items():
        place = names.index(name)
        held = [level for level in levels if level in row]
        axes.errorbar(
            [levels.index(level) + 0.04 * (place - (len(names) - 1) / 2) for level in held],
            [row[level]["mean"] for level in held], [row[level]["spread"] for level in held],
            marker="o", markersize=4, capsize=3, linewidth=1.2, color=f"C{place}", label=table["labels"][name],
        )  # fmt: skip
    axes.set_xticks(range(len(levels)), levels)
    axes.grid(alpha=0.3)
