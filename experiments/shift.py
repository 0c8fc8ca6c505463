"""What a shift of the domain costs: the exports of a sweep, evaluated on data that they were not trained on.

    python -m experiments shift runs/rsicd/one-stage --retrieval '{ucm: UCM/shards}' --scenes '{rsscn7: RSSCN7}'

    OUTPUT/ROW/seed-S/NAME.json    report of `retrieval evaluate`, run as a process of its own, with NAME.log beside it
    OUTPUT/shift.md, shift.json    mean and spread over the seeds of each row, and the difference to the first row

Two test sets of different size have different chance, so a recall on other data cannot be subtracted from that at home.
The table has both, with chance, and compares the rows on the same data seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from priorclip.common.command_names import module_of
from priorclip.common.files import write_text
from priorclip.common.launching import launch_command, run_logged
from priorclip.common.progress import counted
from priorclip.experiments.commands import ShiftConfig
from priorclip.experiments.experiment import experiment_names, load_experiment
from priorclip.experiments.sweep_table import plus_minus, spread

HOME = "at home"
WEIGHTS = "model.safetensors"
Figures = dict[str, dict[int, float]]  # column -> seed -> percent


class ExportedRun(NamedTuple):
    """A run of a sweep that kept its export."""

    row: str
    seed: int
    export: Path
    recall: float | None


def measure_shift(config: ShiftConfig) -> dict[str, Any]:
    """Evaluates what is not evaluated yet, writes the files, and returns the content of the JSON.

    Raises:
        ValueError: the folder has no export, or an evaluation fails; the message names its log
    """
    folder = Path(config.folder)
    runs = find_exports(folder)
    if not runs:
        raise ValueError(
            f"{folder} has no export ROW/seed-S/COMMAND/export: run the sweep with --keep export, or name the folder "
            "that its --output named"
        )
    output = Path(config.output) if config.output else folder / "shift"
    names = list(dict.fromkeys([*config.retrieval, *config.scenes]))
    rows: dict[str, Figures] = {}
    chances: dict[str, float] = {}
    jobs = [(run, name) for run in runs for name in names]
    for run, name in counted(jobs, "evaluations", "run"):
        report = evaluated(run, name, config, output / run.row / f"seed-{run.seed}")
        figures = rows.setdefault(run.row, {})
        if run.recall is not None:
            figures.setdefault(HOME, {})[run.seed] = run.recall
        for column, value in columns_of(report, name).items():
            figures.setdefault(column, {})[run.seed] = value
        if "chance" in report:
            chances[f"{name}: mean recall"] = report["chance"]["mean_recall"]
    known = set(experiment_names())
    labels = {row: load_experiment(row).label if row in known else row for row in rows}
    table = {
        "folder": str(folder),
        "retrieval": config.retrieval,
        "scenes": config.scenes,
        "chance": chances,
        "labels": labels,
        "rows": {row: {name: summary(runs_of) for name, runs_of in figures.items()} for row, figures in rows.items()},
        "less_first": less_first(rows),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "shift.json", json.dumps(table, indent=2) + "\n")
    write_text(output / "shift.md", shift_table(table) + "\n")
    return table


def find_exports(folder: Path) -> list[ExportedRun]:
    """Returns the finished runs of a sweep's folder that have an export of a retrieval model."""
    found = []
    for report in sorted(folder.glob("*/seed-*/*/report.json")):
        export, seed = report.parent / "export", report.parent.parent.name.removeprefix("seed-")
        if not (export / WEIGHTS).is_file() or not seed.isdigit() or report.parent.name in ("prior", "pretrain"):
            continue
        try:
            test = json.loads(report.read_text(encoding="utf-8")).get("test") or {}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{report} is damaged: {error}") from error
        found.append(ExportedRun(report.parent.parent.parent.name, int(seed), export, test.get("mean_recall")))
    return sorted(found, key=lambda run: (place_of(run.row), run.row, run.seed))


def place_of(row: str) -> int:
    """Returns the smallest place of a row in its tables, so that the baseline comes first."""
    if row not in experiment_names():
        return 0
    return min(load_experiment(row).families.values(), default=0)


def evaluated(run: ExportedRun, name: str, config: ShiftConfig, folder: Path) -> dict[str, Any]:
    """Returns the report of a run on the data of a name. An earlier report of the same export and data is taken."""
    parts = {"retrieval": config.retrieval.get(name), "zeroshot,probe": config.scenes.get(name)}
    report: dict[str, Any] = {}
    for tasks, data in parts.items():
        if data is not None:
            report |= evaluate(run, data, tasks, folder / f"{name}-{tasks.replace(',', '-')}.json", config)
    return report


def evaluate(run: ExportedRun, data: str, tasks: str, path: Path, config: ShiftConfig) -> dict[str, Any]:
    words = ["evaluate", "--model", str(run.export), "--data", data, "--tasks", tasks, "--output", str(path)]
    words += [word for key, value in config.options.items() for word in (f"--{key}", text_of(value))]
    record = path.with_suffix(".words.json")
    new = not path.is_file() or path.stat().st_mtime < (run.export / WEIGHTS).stat().st_mtime
    if new or not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != words:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.with_suffix(".log")
        with log.open("wb") as file:
            code = run_logged(launch_command(module_of("retrieval"), words), file)
        if code != 0:
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            raise ValueError(f"the evaluation of {run.export} on {data} failed, see {log}: {last[-300:]}")
        write_text(record, json.dumps(words))
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def columns_of(report: Mapping[str, Any], name: str) -> dict[str, float]:
    """Returns the figures of a report by the names of the table's columns, percent."""
    found = {f"{name}: mean recall": report["mean_recall"]} if "mean_recall" in report else {}
    for task, label in (("zeroshot", "zero-shot top-1"), ("probe", "probe top-1")):
        if task in report:
            found[f"{name}: {label}"] = report[task]["top1"]
    return found


def summary(runs: Mapping[int, float]) -> dict[str, Any]:
    return {**spread(list(runs.values())), "runs": {str(seed): value for seed, value in runs.items()}}


def less_first(rows: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    """Returns for each row but the first its figures less those of the first, paired by seed."""
    first, *others = rows
    found: dict[str, dict[str, Any]] = {}
    for row in others:
        for column, runs in rows[row].items():
            base = rows[first].get(column, {})
            pairs = {seed: value - base[seed] for seed, value in runs.items() if seed in base}
            if pairs:
                found.setdefault(row, {})[column] = summary(pairs)
    return found


def shift_table(table: Mapping[str, Any]) -> str:
    """Returns the Markdown tables: the figures, and those less the first row."""
    columns = list(dict.fromkeys(column for row in table["rows"].values() for column in row))
    head = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines = list(head)
    if table["chance"]:
        cells = [f"{table['chance'][column]:.1f}" if column in table["chance"] else "" for column in columns]
        lines.append(f"| chance | {' | '.join(cells)} |")
    for row, figures in table["rows"].items():
        lines.append(f"| {table['labels'][row]} | {' | '.join(plus_minus(figures.get(each)) for each in columns)} |")
    if table["less_first"]:
        first = table["labels"][next(iter(table["rows"]))]
        lines += ["", head[0].replace("| |", f"| less '{first}', seed by seed |", 1), head[1]]
        for row, figures in table["less_first"].items():
            cells = [plus_minus(figures.get(column), sign=True) for column in columns]
            lines.append(f"| {table['labels'][row]} | {' | '.join(cells)} |")
    return "\n".join(lines)
