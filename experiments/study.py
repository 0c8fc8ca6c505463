"""Studies by name: a few experiments at several levels of one thing, each YAML in ``experiments/studies``.

    asks: does belief make training bear wrong captions?
    axis: share of the training images that have the captions of another   # what the levels are
    levels: [0, 0.1, 0.2, 0.4]
    rows: {one-stage-no-prior: no prior, one-stage-soft: soft belief}      # experiments, and what they are called
    against: [one-stage-no-prior]                                          # what the other rows are compared with
    options: {data: {caption_noise: "{level}"}}                            # over those of the experiment

``python -m finetune sweep STUDY`` runs them as it runs a family. Level 0 is the experiment as it is, without
``options`` and ``first``: its runs, in OUTPUT/clean, are those of every study of the same output folder. Two more
places can be named in braces: ``{level}``, and ``{at_level}``, the folder of that level. ``first`` is a training that
all runs of a level share, by a configuration file: ``{command: prior, config: FILE.yaml, options: {...}}``; its folder
is ``{at_level}/COMMAND``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from priorclip.experiments.experiment import (  # fmt: skip
    STUDIES,
    DataFile,
    Experiment,
    Options,
    commands_of,
    filled,
    load_experiment,
    merged,
    read,
    words_of,
)
from priorclip.model.config import from_dict


@dataclass
class First:
    """The training that comes before the runs of a level."""

    command: str
    config: str
    options: Options = field(default_factory=dict)


@dataclass
class Study:
    """See the module's docstring.

    Args:
        constant: rows that the level does not reach: their runs are those of level 0
        places: those that the data file may leave out
    """

    asks: str
    axis: str
    levels: list[float]
    rows: dict[str, str]
    against: list[str]
    options: Options
    constant: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    first: Any = None
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.first, dict):
            self.first = from_dict(First, self.first)
        if not isinstance(self.rows, dict):
            raise ValueError(f"rows are experiments and what they are called, not {self.rows!r}")
        if not all(isinstance(level, int | float) for level in self.levels):
            raise ValueError(f"levels are numbers, not {self.levels}")
        unknown = [row for row in [*self.against, *self.constant] if row not in self.rows]
        if unknown or not self.levels:
            raise ValueError(f"needs levels; 'against' and 'constant' name rows, not {unknown}")

    def experiments(self) -> list[Experiment]:
        """The rows under the names that they have here."""
        return [replace(load_experiment(name), label=label) for name, label in self.rows.items()]


@dataclass(frozen=True)
class Part:
    """A row at one level, or a row of a plain family.

    Args:
        row: the experiment
        folder: of its runs' folders
        data: where things are
        options: over those of the experiment
        first: folder and words of the training that all runs of the level share
    """

    row: Experiment
    folder: Path
    data: DataFile
    options: Options
    first: tuple[Path, list[str]] | None = None

    def run(self, seed: int) -> Path:
        return self.folder / self.row.name / f"seed-{seed}"

    def commands(self, seed: int) -> list[tuple[Path, list[str]]]:
        """The trainings of a run, as of commands_of."""
        return commands_of(self.row, self.data, seed=seed, run=self.run(seed), extra=self.options)


def study_names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(name: str) -> Study:
    """Raises ValueError that names the file and what is wrong."""
    return read(Study, STUDIES / f"{name}.yaml", name=name)


def part_of(study: Study, level: float, row: Experiment, data: DataFile, output: Path, extra: Options) -> Part:
    """A row at a level of a study: its folder is OUTPUT/STUDY-LEVEL.

    Raises ValueError for a place that neither the study nor the data file names.
    """
    if not level or row.name in study.constant:
        return Part(row, output / "clean", data, extra)
    folder = output / f"{study.name}-{level:g}"
    places = {**study.places, **data.places, "level": f"{level:g}", "at_level": str(folder)}
    first = None
    if study.first is not None:
        run = folder / study.first.command
        options = merged(study.first.options, {"run": {"dir": str(run)}})
        words = words_of(filled({"config": study.first.config, **options}, places, study.name))
        first = (run, ["finetune", study.first.command, *words])
    return Part(row, folder, replace(data, places=places), merged(study.options, extra), first)
