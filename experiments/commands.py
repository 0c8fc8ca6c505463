"""The options of ``python -m experiments``: one dataclass a sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass
class SweepConfig:
    """Run a family of experiments, or a study, over several seeds; write a table with mean and spread, and a plot.

    Args:
        name: a family, or one experiment, of experiments/rows, or a study of experiments/studies
        seeds: number of seeds
        first_seed: the first seed
        folds: number of consecutive seeds that are the splits of one cross-validation; their mean is one figure
        data: name of a file in experiments/data, or a path; it says where shards and weights are, and sets options
        output: folder of the runs and the table; null takes runs/sweeps/NAME
        ranks: processes of each training, started by the deepspeed launcher; 0 trains in one process
        jobs: number of trainings that run at the same time
        rows: names of the experiments to run; null runs all of the family
        levels: levels of a study; null takes the study's own
        keep: parts of a finished run to keep: all; export removes checkpoints; report removes export and tokenizer too
        options: options of the trainings that override all others, as JSON or YAML: '{run: {epochs: 2}}'
        dry_run: print the commands and run nothing
    """

    name: str
    seeds: int = 3
    first_seed: int = 0
    folds: int = 1
    data: str = "default"
    output: str | None = None
    ranks: int = 0
    jobs: int = 1
    rows: list[str] | None = None
    levels: list[float] | None = None
    keep: Literal["all", "export", "report"] = "all"
    options: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "folds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.seeds % self.folds:
            raise ValueError(f"--seeds {self.seeds} must be a multiple of --folds {self.folds}")


@dataclass
class ResplitConfig:
    """Split the images of a Karpathy JSON again into train, val and test, within each scene, for cross-validation.

    Args:
        json: Karpathy JSON
        output: folder for split-0.json, split-1.json ...
        count: number of splits
        test: share of each scene's images for the test set
        validation: share of each scene's images for the validation set
        train: share of each scene's images for training, the others are left out; null takes all that remain
        among: split only the images of this split and leave out the others; null takes all images
        seed: seed of the order in which a scene's images are tested
    """

    json: str
    output: str
    count: int = 1
    test: float = 0.2
    validation: float = 0.0
    train: float | None = None
    among: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.test < 0 or self.validation < 0 or not self.test + self.validation < 1:
            raise ValueError(
                f"--test {self.test} and --validation {self.validation} must be shares that leave images for training"
            )
        if self.train is not None and not 0 < self.train <= 1:
            raise ValueError(f"--train {self.train} must be a share of each scene's images, above 0 and at most 1")


@dataclass
class CollectConfig:
    """Write the results of families that were run to two small CSV files, which a page's tables are checked against.

    Args:
        folders: folders of sweeps, each the --output of 'sweep FAMILY'
        output: CSV file with a line for each run; the intervals go to NAME.intervals.csv beside it
    """

    folders: list[str]
    output: str

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".csv":
            raise ValueError(f"--output {self.output} must be a CSV file, such as docs/results/rsicd.csv")


@dataclass
class TablesConfig:
    """Print the Markdown tables of a file that 'collect' wrote, each with the comment by which a page names it.

    Args:
        file: the CSV file with a line for each run
        names: tables to print; null prints all
        less: names of the rows that are subtracted from the others; null takes the first row of each table
    """

    file: str
    names: list[str] | None = None
    less: list[str] | None = None


@dataclass
class FitConfig:
    """Fit a power law to the levels of a study; write table, JSON and a plot with the prediction for ten times more.

    Args:
        file: table of a study as 'sweep STUDY' wrote it: OUTPUT/STUDY.json
        output: files are named OUTPUT.fit.json, .md and .png; null takes the name of the file without .json
        floor: fit a part of the error that stays for any level
        bootstrap: resamples of the seeds for the 95 % band
        seed: of the resamples
    """

    file: str
    output: str | None = None
    floor: bool = False
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bootstrap <= 100_000:
            raise ValueError(f"--bootstrap must be between 1 and 100000, not {self.bootstrap}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, not {self.seed}")


@dataclass
class ShiftConfig:
    """Evaluate the exports of a sweep on other data: what a shift of the domain costs each row.

    The sweep has kept its exports (--keep export). Each figure stands in a JSON file of its own, so the same command
    goes on after an interruption and takes new runs in.

    Args:
        folder: folder of the sweep, the --output of 'sweep FAMILY'
        retrieval: test sets with captions by name, in the forms of `retrieval evaluate --data`:
            '{ucm: runs/ucm/shards/test}'
        scenes: labelled images by name, for zero-shot classification and a linear probe: '{ucm: ..., rsscn7: RSSCN7}'
        output: folder of the figures and of shift.md and shift.json; null takes FOLDER/shift
        options: further options of `retrieval evaluate`, as JSON or YAML: '{batch_size: 128}'
    """

    folder: str
    retrieval: dict[str, str] = field(default_factory=dict)
    scenes: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {*self.retrieval, *self.scenes}
        if not names:
            raise ValueError("name other data by --retrieval '{NAME: SHARDS}', --scenes '{NAME: IMAGES}' or both")
        for name in names:
            if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
                raise ValueError(f"--retrieval and --scenes: the name {name!r} may have letters, digits, - and _ only")


COMMANDS: dict[str, type[Any]] = {
    "sweep": SweepConfig,
    "resplit": ResplitConfig,
    "collect": CollectConfig,
    "tables": TablesConfig,
    "fit": FitConfig,
    "shift": ShiftConfig,
}
POSITIONAL = {"sweep": "name", "collect": "folders", "tables": "file", "fit": "file", "shift": "folder"}
# Commands that `python -m finetune` has too, by their older names.
OF_FINETUNE = {name: COMMANDS[name] for name in ("sweep", "resplit")}
