"""The table of a sweep: mean and spread of each row over its seeds, and the paired difference to the baseline.

    write_table("belief", rows, results, Path("runs/belief"), note, command)    # belief.md, belief.json, belief.png

The spread is the sample standard deviation. The difference is paired: the figure of each seed minus the baseline's
figure of the same seed (same data split, same order of samples), so that shared variation cancels.

    22.1 ± 0.3 [20.2, 24.0]     mean, spread over the seeds, 95 % interval over the test images (intervals.py)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from priorclip.experiments.experiment import Experiment
from priorclip.experiments.intervals import MAIN, Intervals, image_intervals, images_of, with_interval

FIGURES = {  # figures of retrieval and of a scene prior, the main one first
    "mean_recall": "mean recall",
    "i2t_r1": "i2t R@1",
    "t2i_r1": "t2i R@1",
    "i2t_r10": "i2t R@10",
    "t2i_r10": "t2i R@10",
    "accuracy": "accuracy",
}
LEGEND = "Percent, mean and standard deviation over the seeds; differences are paired by seed."
INTERVALS = " In brackets: 95 % bootstrap interval over the test images."
Results = dict[str, dict[int, dict[str, Any]]]


def write_table(
    name: str, rows: Sequence[Experiment], results: Results, folder: Path, note: str, command: str
) -> dict[str, Any]:
    """Writes NAME.md, NAME.json and NAME.png; returns the content of the JSON.

    The rows have intervals if the runs in the folder have files of their test images.
    """
    known = [row for row in rows if results[row.name]]
    intervals = image_intervals(images_of(known, results, folder))
    table = {
        "family": name, "command": command, "note": note,
        "rows": [summary(row, known, results, intervals) for row in known],
        "not_run": [row.name for row in rows if not results[row.name]],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(table), encoding="utf-8")
    if known:
        draw(table, folder / f"{name}.png")
    return table


def summary(
    row: Experiment, rows: Sequence[Experiment], results: Results, intervals: Intervals | None = None
) -> dict[str, Any]:
    """Returns a row: figures by seed, their mean and spread, and the paired difference to the first row.

    The difference is None if the two rows are tested on different images.
    """
    first, runs = rows[0], results[row.name]
    paired = row is not first and test_of(row) == test_of(first)
    return {
        "name": row.name, "label": row.label, "reproduces": row.reproduces, "published": row.published,
        "seeds": sorted(runs), "main": main_figure(runs), "figures": row_figures(row.name, results, intervals or {}),
        "difference": difference(row.name, first.name, results, intervals or {}) if paired else None,
    }  # fmt: skip


def row_figures(row: str, results: Results, intervals: Intervals) -> dict[str, Any]:
    """Returns mean, spread and runs of each figure that all runs of a row have; of mean recall, also the interval."""
    runs = results[row]
    return {
        figure: {
            **with_interval(
                spread([run[figure] for run in runs.values()]), intervals.get((row, "")) if figure == MAIN else None
            ),
            "runs": {str(seed): run[figure] for seed, run in runs.items()},
        }
        for figure in FIGURES
        if all(figure in run for run in runs.values())
    }


def difference(row: str, other: str, results: Results, intervals: Intervals) -> dict[str, Any] | None:
    """Returns a row's main figure less that of another, paired by seed; None if they share no seed or no figure."""
    runs, others = results[row], results[other]
    main = main_figure(runs)
    pairs = [runs[seed][main] - others[seed][main] for seed in runs if main in others.get(seed, {})]
    return with_interval(spread(pairs), intervals.get((row, other))) if pairs else None


def test_of(row: Experiment) -> Any:
    """Returns the test shards that the row names, or None if it uses those of the data file."""
    return row.steps[-1].options.get("test", {}).get("shards")


def main_figure(runs: Mapping[int, Mapping[str, Any]]) -> str:
    return next(figure for figure in FIGURES if all(figure in run for run in runs.values()))


def spread(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "spread": deviation, "count": len(values)}


def markdown(table: dict[str, Any]) -> str:
    """Returns the table as Markdown."""
    lines = [f"# {table['family']}", "", f"`{table['command']}`", ""]
    if table["note"]:
        lines += [table["note"], ""]
    rows = table["rows"]
    if rows:
        shown = [figure for figure in FIGURES if any(figure in row["figures"] for row in rows)]
        first = rows[0]["label"]
        lines += [
            "| | " + " | ".join(FIGURES[figure] for figure in shown) + f" | less {first} | seeds | published |",
            "|---|" + "---:|" * (len(shown) + 2) + "---|",
        ]
        for row in rows:
            cells = [plus_minus(row["figures"].get(figure)) for figure in shown]
            cells.append(plus_minus(row["difference"], sign=True))
            lines.append(
                f"| {row['label']} | {' | '.join(cells)} | {len(row['seeds'])} | {published(row['published'])} |"
            )
        lines += ["", f"{LEGEND}{INTERVALS if any_interval(rows) else ''}", ""]
        lines += [f"* {row['label']}: {row['reproduces']}" for row in rows]
    if table["not_run"]:
        lines += ["", f"Not run: {', '.join(table['not_run'])}."]
    return "\n".join(lines) + "\n"


def any_interval(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any("interval" in row["figures"].get(MAIN, {}) for row in rows)


def plus_minus(value: Mapping[str, Any] | None, sign: bool = False) -> str:
    """Returns a figure as ``22.1 ± 0.3 [20.2, 24.0]``, without what is not known of it."""
    if value is None:
        return ""
    form = "+.1f" if sign else ".1f"
    mean = f"{value['mean']:{form}}"
    over_seeds = f" ± {value['spread']:.1f}" if value["count"] > 1 else ""
    bounds = ", ".join(f"{bound:.1f}" for bound in value.get("interval", ()))
    return f"{mean}{over_seeds} [{bounds}]" if bounds else f"{mean}{over_seeds}"


def published(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    figures = ", ".join(
        f"{FIGURES.get(name, name.replace('_r', ' R@'))} {figure}" for name, figure in value.items() if name != "source"
    )
    return f"{figures} ({value['source']})" if "source" in value else figures


def draw(table: dict[str, Any], path: Path) -> None:
    """Draws each run as a point, and the mean with its spread as a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = table["rows"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = row["figures"][row["main"]]
        axes.errorbar(values["mean"], place, xerr=values["spread"], fmt="o", capsize=4, color="C0")
        axes.plot(list(values["runs"].values()), [place - 0.18] * len(values["runs"]), ".", color="0.6")
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{FIGURES[rows[0]['main']]}, %: mean ± standard deviation, runs")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
