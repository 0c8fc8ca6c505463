"""Studies by name: a few experiments at several levels of one factor. Each is a YAML file in ``experiments/studies``.

    asks: does belief make training bear wrong captions?
    axis: share of the training images that have the captions of another   # meaning of the levels
    levels: [0, 0.1, 0.2, 0.4]
    rows: {one-stage-no-prior: no prior, one-stage-soft: soft belief}      # experiments and their labels
    against: [one-stage-no-prior]                                          # rows that the others are compared with
    options: {data: {caption_noise: "{level}"}}                            # override the experiment's

``python -m experiments sweep STUDY`` runs a study like a family. Level 0 is the experiment without ``options`` and
``first``. Its runs are in OUTPUT/clean, which all studies of one output folder share. ``clean: null`` treats 0 as any
other level. Two more names can stand in braces: ``{level}``, and ``{at_level}``, the folder of that level. ``at`` gives
names whose value depends on the level: ``at: {passes: {"250": "31.212", "500": "15.606"}}``. ``first`` is a training
that all runs of a level share: ``{command: prior, config: FILE.yaml, options: {...}}``. Its folder is
``{at_level}/COMMAND``.
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
    fill_names,
    load_experiment,
    merge_options,
    option_words,
    read_yaml,
)
from priorclip.model.config import from_dict


@dataclass
class FirstTraining:
    """The training that all runs of a level start from."""

    command: str
    config: str
    options: Options = field(default_factory=dict)


@dataclass
class Study:
    """A study, as the module's docstring describes it.

    Args:
        constant: rows that do not depend on the level; their runs are those of level 0
        places: default values of names in braces that a data file can leave out
        at: name in braces -> level -> value
        clean: the level without ``options`` and ``first``; None if there is none
        scene_sizes: shards whose scenes' sizes tell head, middle and tail, for tables of their recall; None for none
    """

    asks: str
    axis: str
    levels: list[float]
    rows: dict[str, str]
    against: list[str]
    options: Options
    constant: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    at: dict[str, dict[str, str]] = field(default_factory=dict)
    clean: float | None = 0
    scene_sizes: str | None = None
    first: Any = None
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.first, dict):
            self.first = from_dict(FirstTraining, self.first)
        if not isinstance(self.rows, dict):
            raise ValueError(f"rows must map experiments to labels, not {self.rows!r}")
        if not all(isinstance(level, int | float) for level in self.levels):
            raise ValueError(f"levels must be numbers, not {self.levels}")
        self.at = {
            name: {f"{float(level):g}": str(value) for level, value in values.items()}
            for name, values in self.at.items()
        }
        unknown = [row for row in [*self.against, *self.constant] if row not in self.rows]
        if unknown or not self.levels:
            raise ValueError(f"levels are missing, or 'against' and 'constant' name no rows: {unknown}")

    def experiments(self) -> list[Experiment]:
        """The experiments of the rows, with the labels of this study."""
        return [replace(load_experiment(name), label=label) for name, label in self.rows.items()]


@dataclass(frozen=True)
class RowAtLevel:
    """A row at one level, or a row of a plain family.

    Args:
        row: the experiment
        folder: the folder that holds the folders of its runs
        data: where shards and weights are
        options: override the experiment's options
        first: folder and command line of the training that all runs of the level share
    """

    row: Experiment
    folder: Path
    data: DataFile
    options: Options
    first: tuple[Path, list[str]] | None = None

    def run(self, seed: int) -> Path:
        return self.folder / self.row.name / f"seed-{seed}"

    def commands(self, seed: int) -> list[tuple[Path, list[str]]]:
        """The trainings of a run, as ``commands_of`` returns them."""
        return commands_of(self.row, self.data, seed=seed, run=self.run(seed), extra=self.options)


def study_names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(name: str) -> Study:
    """Reads a study. The ValueError for a wrong file names the file and the key."""
    return read_yaml(Study, STUDIES / f"{name}.yaml", name=name)


def row_at_level(
    study: Study, level: float, row: Experiment, data: DataFile, output: Path, extra: Options
) -> RowAtLevel:
    """Returns a row at a level of a study. Its folder is OUTPUT/STUDY-LEVEL.

    Raises:
        ValueError: neither the study nor the data file gives a value for a name in braces.
    """
    if level == study.clean or row.name in study.constant:
        return RowAtLevel(row, output / "clean", data, extra)
    folder = output / f"{study.name}-{level:g}"
    own = {"level": f"{level:g}", "at_level": str(folder)}
    for name, values in study.at.items():
        if own["level"] not in values and name not in data.places:
            raise ValueError(
                f"study {study.name}: '{name}' has values for the levels {', '.join(values)}, not for {level:g}: give "
                f"one for all levels as a place of the data file, or take other --levels"
            )
        own |= {name: values[own["level"]]} if own["level"] in values else {}
    places = {**study.places, **data.places, **own}
    first = None
    if study.first is not None:
        run = folder / study.first.command
        options = merge_options(study.first.options, {"run": {"dir": str(run)}})
        words = option_words(fill_names({"config": study.first.config, **options}, places, study.name))
        first = (run, ["finetune", study.first.command, *words])
    return RowAtLevel(row, folder, replace(data, places=places), merge_options(study.options, extra), first)
