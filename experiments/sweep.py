"""A family of experiments, several seeds each: run what is not done yet, then the table, mean and spread, and a plot.

    python -m finetune sweep belief --seeds 5 --data ucmerced --output runs/evidence/belief

A study (``experiments/studies``) is a family at several levels of one thing, caption noise say: see study.py.

Runs are OUTPUT/ROW/seed-S/COMMAND, of a study OUTPUT/STUDY-LEVEL/ROW/seed-S/COMMAND. One that has its report is not
run again, one that was cut short goes on from its checkpoint; so the same command continues a sweep, or adds seeds to
it. A training that several rows begin with, one pretraining that is tuned on several benchmarks, is run once: the
others' folders are links to it. On one process (``--ranks 0``) the trainings are forked from a server that has imported
torch and DeepSpeed once.
"""

from __future__ import annotations

import json
import logging
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
from priorclip.experiments.commands import SweepConfig
from priorclip.experiments.experiment import Experiment, family, load_data
from priorclip.experiments.study import Part, load_study, part_of, study_names
from priorclip.experiments.study_table import write_study
from priorclip.experiments.sweep_table import write_table

logger = logging.getLogger(__name__)

PRELOAD = ["deepspeed", "timm", "transformers", "torch.utils.tensorboard", "priorclip.pretrain.train_retrieval",
           "priorclip.finetune.train_prior"]  # fmt: skip
WORDS = "sweep.json"  # the words of a run, beside its report
MEASURED = {"--test.shards", "--evaluation.shards", "--config"}  # a configuration file may name them too
DROPPED = {"all": [], "export": ["checkpoints"], "report": ["checkpoints", "export", "tokenizer"]}

Command = tuple[Path, list[str]]  # a training's folder, and the words after python -m


def sweep(config: SweepConfig) -> int:
    """Run the sweep; returns the exit code: 1 where a run failed.

    Raises ValueError where a name, a data file or a folder that holds other runs is wrong.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    data, output = load_data(config.data), Path(config.output or f"runs/sweeps/{config.name}")
    study = load_study(config.name) if config.name in study_names() else None
    if config.levels and not study:
        raise ValueError(f"--levels: '{config.name}' is no study; there are {', '.join(study_names())}")
    rows = chosen(study.experiments() if study else family(config.name), config)
    table = {
        f"{level:g}": {row.name: part_of(study, level, row, data, output, config.options) for row in rows}
        for level in config.levels or study.levels
    } if study else {"0": {row.name: Part(row, output, data, config.options) for row in rows}}  # fmt: skip
    parts = [part for level in table.values() for part in level.values()]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    shared = {part.first[0].parent: [part.first] for part in parts if part.first}
    plans = {part.run(seed): part.commands(seed) for seed in seeds for part in parts}
    for run, commands in plans.items():
        if not MEASURED & {*commands[-1][1]}:
            raise ValueError(
                f"{run}: its last training, {commands[-1][0].name}, would measure nothing: give it test.shards or "
                f"evaluation.shards in the data file {config.data}, or by --options"
            )
    same = same_trainings(plans.values())
    if config.dry_run:
        for folder, words in (each for commands in [*shared.values(), *plans.values()] for each in commands):
            print(
                f"# {folder} is {same[folder][0]}"
                if folder in same
                else display_command(command_of(words, config.ranks))
            )
        return 0
    # What the runs of a level start from is kept, whatever of theirs is not.
    failed = run_plans(shared, replace(config, keep="all" if config.keep == "all" else "export"))
    held_up = {part.run(seed) for seed in seeds for part in parts if part.first and part.first[0].parent in failed}
    failed += run_plans({run: plan for run, plan in plans.items() if run not in held_up}, config, same)
    results = {
        level: {name: cross_validated(figures_of(part, seeds), config) for name, part in parts.items()}
        for level, parts in table.items()
    }
    note = data.note
    if config.folds > 1:
        note = f"{note} A seed is a cross-validation here: the mean over its {config.folds} splits.".strip()
    command = shlex.join(["python", "-m", "finetune", *sys.argv[1:]])
    if study:
        write_study(study, results, output, note, command)
    else:
        write_table(config.name, rows, results["0"], output, note, command)
    print((output / f"{config.name}.md").read_text(encoding="utf-8"))
    for run in failed:
        print(f"failed: {run}: its log is {run}/*.log")
    return 1 if failed else 0


def chosen(rows: list[Experiment], config: SweepConfig) -> list[Experiment]:
    """The rows that ``--rows`` names, in the family's order. ValueError for a name that the family lacks."""
    names = [row.name for row in rows]
    if config.rows is None:
        return rows
    unknown = [name for name in config.rows if name not in names]
    if unknown or not config.rows:
        raise ValueError(f"--rows: '{config.name}' has no '{', '.join(unknown)}'; its rows are {', '.join(names)}")
    return [row for row in rows if row.name in config.rows]


def same_trainings(plans: Iterable[list[Command]]) -> dict[Path, Command]:
    """Of the trainings that differ in their folder alone: folder -> the first of them. One that has been run stays."""
    first: dict[tuple[str, ...], Command] = {}
    same: dict[Path, Command] = {}
    for folder, words in (each for commands in plans for each in commands):
        original = first.setdefault(elsewhere(words), (folder, words))
        if original[0] != folder and (folder.is_symlink() or not folder.exists()):
            same[folder] = original
    return same


def elsewhere(words: list[str]) -> tuple[str, ...]:
    """What a training is, wherever it is written: its words without those of its folder."""
    at = words.index("--run.dir")
    return (*words[:at], *words[at + 2 :])


def run_plans(
    plans: Mapping[Path, list[Command]], config: SweepConfig, same: Mapping[Path, Command] | None = None
) -> list[Path]:
    """Run what is not done, by the folder of each run; returns those of the runs that failed."""
    locks = {folder: threading.Lock() for commands in plans.values() for folder, _ in commands}

    def run(commands: list[Command]) -> bool:
        return run_all(commands, config, same or {}, locks)

    with ThreadPoolExecutor(config.jobs) as pool:
        done = list(pool.map(run, plans.values()))
    return [run for run, good in zip(plans, done, strict=True) if not good]


def run_all(
    commands: list[Command], config: SweepConfig, same: Mapping[Path, Command], locks: Mapping[Path, threading.Lock]
) -> bool:
    """The trainings of a run, those that have their report left out; whether all went well."""
    done: list[Path] = []
    needed = {folder for folder, _ in same.values()}  # by other runs, which may come later
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
        for name in DROPPED[config.keep]:
            shutil.rmtree(folder / name, ignore_errors=True)
    return True


def run_training(folder: Path, words: list[str], ranks: int) -> bool:
    if folder.is_symlink() and not folder.exists():
        folder.unlink()  # to another row's, which was removed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WORDS).write_text(json.dumps(words))
    begun = time.monotonic()
    code = run_words(words, folder.with_suffix(".log"), ranks)
    logger.info("%s: %s, %.0f s", folder, "done" if code == 0 else f"exit code {code}", time.monotonic() - begun)
    return code == 0


def finished(folder: Path, words: list[str]) -> bool:
    """Whether the training has its report, or the one that its folder is a link to, of a sweep with more rows.

    ValueError where the folder holds one with other options, unless that failed before its first checkpoint.
    """
    record, report = folder / WORDS, folder / "report.json"
    other = record.is_file() and elsewhere(json.loads(record.read_text())) != elsewhere(words)
    if other and (report.is_file() or any(folder.glob("checkpoints/*"))):
        raise ValueError(f"{folder} holds a run with other options: remove it, or give another --output")
    return report.is_file()


def run_words(words: list[str], log: Path, ranks: int) -> int:
    """Exit code of ``python -m WORDS``; its output goes to the log."""
    if ranks:
        with log.open("ab") as file:
            return run_logged(command_of(words, ranks), file)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_here, args=(words, str(log)))
    process.start()
    process.join()
    return process.exitcode or 0


def run_here(words: list[str], log: str) -> None:
    """The body of a forked process: it becomes ``python -m WORDS``."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.argv = words
    runpy.run_module(module_of(words[0]), run_name="__main__", alter_sys=True)


def command_of(words: list[str], ranks: int) -> list[str]:
    """The command line of a training: plain python, or the deepspeed launcher for several ranks on this host."""
    return launch_command(module_of(words[0]), words[1:], ranks)


def figures_of(part: Part, seeds: range) -> dict[int, dict[str, Any]]:
    """The figures of each finished run by its seed: the test's, else those of the last evaluation."""
    found: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        path = part.run(seed) / part.row.steps[-1].command / "report.json"
        if path.is_file():
            report = json.loads(path.read_text())
            figures = report.get("test") or report["evaluation"]
            if figures:
                found[seed] = figures
            else:
                logger.warning("%s has no figures: its training had no shards to be tested on", path)
    return found


def cross_validated(runs: dict[int, dict[str, Any]], config: SweepConfig) -> dict[int, dict[str, Any]]:
    """The mean figures of each cross-validation whose splits are all done, by its place; the runs where it is one."""
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
