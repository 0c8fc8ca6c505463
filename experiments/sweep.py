"""Runs a family of experiments with several seeds and writes the table with mean and spread, and a plot.

    python -m experiments sweep belief-open --seeds 5 --data ucmerced --output runs/evidence/belief

A study (``experiments/studies``) is a family at several levels of one factor, such as caption noise: see study.py.

Runs are OUTPUT/ROW/seed-S/COMMAND; of a study, OUTPUT/STUDY-LEVEL/ROW/seed-S/COMMAND. A run with a report is not run
again, and an interrupted run continues from its checkpoint. So the same command continues a sweep or adds seeds to it.
If several rows begin with the same training, such as one pretraining that is tuned on several benchmarks, it runs once
and the folders of the others are links to it. With ``--ranks 0`` the trainings are forked from a server that has
imported torch and DeepSpeed once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from priorclip.common.command_names import module_of
from priorclip.common.launching import display_command, launch_command, run_logged
from priorclip.common.masking import masked
from priorclip.common.output import get_logger, say, set_up_logging
from priorclip.common.processes import end_with_asker
from priorclip.experiments.commands import SweepConfig
from priorclip.experiments.experiment import Experiment, family, load_data
from priorclip.experiments.scene_parts import results_by_part
from priorclip.experiments.study import RowAtLevel, load_study, row_at_level, study_names
from priorclip.experiments.study_table import write_study
from priorclip.experiments.sweep_table import write_table

logger = get_logger(__name__)

PRELOAD = ["deepspeed", "priorclip.model.encoders", "torch.utils.tensorboard", "priorclip.pretrain.train_retrieval",
           "priorclip.finetune.train_prior"]  # fmt: skip
COMMAND_FILE = "sweep.json"  # the command line of a run, beside its report
TEST_OPTIONS = {
    "--test.shards",
    "--evaluation.shards",
    "--config",
}  # options that name test data; a configuration file can name it too
REMOVED = {"all": [], "export": ["checkpoints"], "report": ["checkpoints", "export", "tokenizer"]}

Command = tuple[Path, list[str]]  # a training's folder, and its command line after python -m


def sweep(config: SweepConfig) -> int:
    """Runs the sweep and returns the exit code, 1 if a run failed.

    Raises:
        ValueError: a name or data file is wrong, or a folder holds other runs.
    """
    set_up_logging("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    data, output = load_data(config.data), Path(config.output or f"runs/sweeps/{config.name}")
    study = load_study(config.name) if config.name in study_names() else None
    if config.levels and not study:
        raise ValueError(f"--levels: '{config.name}' is no study; there are {', '.join(study_names())}")
    rows = selected_rows(study.experiments() if study else family(config.name), config)
    table = {
        f"{level:g}": {row.name: row_at_level(study, level, row, data, output, config.options) for row in rows}
        for level in config.levels or study.levels
    } if study else {"0": {row.name: RowAtLevel(row, output, data, config.options) for row in rows}}  # fmt: skip
    parts = [part for level in table.values() for part in level.values()]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    shared = {part.first[0].parent: [part.first] for part in parts if part.first}
    plans = {part.run(seed): part.commands(seed) for seed in seeds for part in parts}
    for run, commands in plans.items():
        if not TEST_OPTIONS & {*commands[-1][1]}:
            raise ValueError(
                f"{run}: its last training, {commands[-1][0].name}, would measure nothing: set test.shards or "
                f"evaluation.shards in the data file {config.data}, or by --options"
            )
    same = find_repeated(plans.values())
    if config.dry_run:
        for folder, words in (each for commands in [*shared.values(), *plans.values()] for each in commands):
            say(
                f"# {folder} is {same[folder][0]}"
                if folder in same
                else display_command(command_of(words, config.ranks))
            )
        return 0
    # The export of a shared first training is always kept, because the runs of its level start from it.
    failed = run_plans(shared, replace(config, keep="all" if config.keep == "all" else "export"))
    blocked = {part.run(seed) for seed in seeds for part in parts if part.first and part.first[0].parent in failed}
    failed += run_plans({run: plan for run, plan in plans.items() if run not in blocked}, config, same)
    results = {
        level: {name: average_folds(figures_of(part, seeds), config) for name, part in parts.items()}
        for level, parts in table.items()
    }
    note = data.note
    if config.folds > 1:
        note = f"{note} Here a seed is a cross-validation: the mean over its {config.folds} splits.".strip()
    command = masked(shlex.join(["python", "-m", "experiments", *sys.argv[1:]]))
    if study:
        by_part = results_by_part(study, table, results, seeds) if config.folds == 1 else {}
        write_study(study, results, output, note, command, by_part)
    else:
        write_table(config.name, rows, results["0"], output, note, command)
    say((output / f"{config.name}.md").read_text(encoding="utf-8"))
    for run in failed:
        say(f"failed: {run}: its log is {run}/*.log")
    return 1 if failed else 0


def selected_rows(rows: list[Experiment], config: SweepConfig) -> list[Experiment]:
    """Returns the rows that ``--rows`` names, in the family's order. Raises ValueError for an unknown name."""
    names = [row.name for row in rows]
    if config.rows is None:
        return rows
    unknown = [name for name in config.rows if name not in names]
    if unknown or not config.rows:
        raise ValueError(f"--rows: '{config.name}' has no '{', '.join(unknown)}'; its rows are {', '.join(names)}")
    return [row for row in rows if row.name in config.rows]


def find_repeated(plans: Iterable[list[Command]]) -> dict[Path, Command]:
    """Maps the folder of a repeated training to the first one that differs from it in the folder only.

    A repeated training that has been run already is not in the mapping.
    """
    first: dict[tuple[str, ...], Command] = {}
    same: dict[Path, Command] = {}
    for folder, words in (each for commands in plans for each in commands):
        original = first.setdefault(without_folder(words), (folder, words))
        if original[0] != folder and (folder.is_symlink() or not folder.exists()):
            same[folder] = original
    return same


def without_folder(words: list[str]) -> tuple[str, ...]:
    """Returns the command line without the option that names the training's folder."""
    at = words.index("--run.dir")
    return (*words[:at], *words[at + 2 :])


def run_plans(
    plans: Mapping[Path, list[Command]], config: SweepConfig, same: Mapping[Path, Command] | None = None
) -> list[Path]:
    """Runs the trainings that are not finished; returns the folders of the runs that failed."""
    locks = {folder: threading.Lock() for commands in plans.values() for folder, _ in commands}

    def run(commands: list[Command]) -> bool:
        return run_trainings(commands, config, same or {}, locks)

    with ThreadPoolExecutor(config.jobs) as pool:
        done = list(pool.map(run, plans.values()))
    return [run for run, good in zip(plans, done, strict=True) if not good]


def run_trainings(
    commands: list[Command], config: SweepConfig, same: Mapping[Path, Command], locks: Mapping[Path, threading.Lock]
) -> bool:
    """Runs the trainings of a run that have no report yet; returns whether all succeeded."""
    done: list[Path] = []
    needed = {folder for folder, _ in same.values()}  # trainings that later runs need
    for folder, words in commands:
        original, own = same.get(folder, (folder, words))
        with locks[original]:
            if not finished(original, own):
                if not run_training(original, own, config.ranks):
                    return False
                done += [original] if original not in needed else []
        if original != folder and not folder.is_symlink():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(os.path.relpath(original, folder.parent))
    for folder in done:
        for name in REMOVED[config.keep]:
            shutil.rmtree(folder / name, ignore_errors=True)
    return True


def run_training(folder: Path, words: list[str], ranks: int) -> bool:
    if folder.is_symlink() and not folder.exists():
        folder.unlink()  # the link leads to another row's training, which was removed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMAND_FILE).write_text(json.dumps(words))
    begun = time.monotonic()
    code = run_words(words, folder.with_suffix(".log"), ranks)
    logger.info("%s: %s, %.0f s", folder, "done" if code == 0 else f"exit code {code}", time.monotonic() - begun)
    return code == 0


def finished(folder: Path, words: list[str]) -> bool:
    """Returns whether the training, or the one that its folder links to, has its report.

    Raises:
        ValueError: the folder holds a training with other options that has a checkpoint or a report.
    """
    record, report = folder / COMMAND_FILE, folder / "report.json"
    other = record.is_file() and without_folder(json.loads(record.read_text())) != without_folder(words)
    if other and (report.is_file() or any(folder.glob("checkpoints/*"))):
        raise ValueError(f"{folder} holds a run with other options: remove it, or give another --output")
    return report.is_file()


def run_words(words: list[str], log: Path, ranks: int) -> int:
    """Runs ``python -m WORDS`` with its output in the log; returns the exit code."""
    if ranks:
        with log.open("ab") as file:
            return run_logged(command_of(words, ranks), file)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_in_fork, args=(words, str(log)))
    process.start()
    process.join()
    return process.exitcode or 0


def run_in_fork(words: list[str], log: str) -> None:
    """Runs ``python -m WORDS`` in a forked process, which ends with the sweep."""
    end_with_asker()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.argv = words
    runpy.run_module(module_of(words[0]), run_name="__main__", alter_sys=True)


def command_of(words: list[str], ranks: int) -> list[str]:
    """The command line of a training: plain python, or the deepspeed launcher for several ranks on this host."""
    return launch_command(module_of(words[0]), words[1:], ranks)


def figures_of(part: RowAtLevel, seeds: range) -> dict[int, dict[str, Any]]:
    """Returns the figures of each finished run by seed: those of the test, or else of the last evaluation."""
    found: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        path = part.run(seed) / part.row.steps[-1].command / "report.json"
        if path.is_file():
            report = json.loads(path.read_text())
            figures = report.get("test") or report["evaluation"]
            if figures:
                found[seed] = figures
            else:
                logger.warning("%s has no figures, because its training had no test shards", path)
    return found


def average_folds(runs: dict[int, dict[str, Any]], config: SweepConfig) -> dict[int, dict[str, Any]]:
    """Returns the mean figures of each complete cross-validation by its number; with one fold, the runs themselves."""
    if config.folds == 1:
        return runs
    found = {}
    for place in range(config.seeds // config.folds):
        first = config.first_seed + place * config.folds
        own = [runs[seed] for seed in range(first, first + config.folds) if seed in runs]
        if len(own) == config.folds:
            names = [name for name, value in own[0].items() if isinstance(value, int | float)]
            found[place] = {name: statistics.fmean(run[name] for run in own) for name in names}
    return found
