"""The options of ``python -m experiments``: one dataclass a sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class SweepConfig:
    """Run a family of experiments, or a study, over several seeds: a table with mean and spread, and a plot.

    Args:
        name: a family, or one experiment, of experiments/rows, or a study of experiments/studies
        seeds: how many
        first_seed: the first of them
        folds: so many seeds, one after the other, are the splits of one cross-validation: their mean is one figure
        data: a file of experiments/data by its name, or a path: where shards and weights are, and options that it sets
        output: folder of the runs and the table; null takes runs/sweeps/NAME
        ranks: processes of each training, under the deepspeed launcher; 0 trains in one process
        jobs: trainings at a time
        rows: names of the experiments to run; null runs all of the family
        levels: of a study, in place of its own
        keep: of a run that is done: all; export, without its checkpoints; report, without export and tokenizer too
        options: options of the trainings that win over all others, as JSON or YAML: '{run: {epochs: 2}}'
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
            raise ValueError(f"--seeds {self.seeds} is no multiple of --folds {self.folds}: a cross-validation is cut")


@dataclass
class ResplitConfig:
    """Deal the images of a Karpathy JSON anew into train, val and test, within each scene, for cross-validation.

    Args:
        json: Karpathy JSON
        output: folder of split-0.json, split-1.json ...
        count: how many splits
        test: share of each scene's images that become the test set
        validation: share of each scene's images that become the validation set
        train: share of each scene's images to train on, the others are left out; null trains on all that are left
        among: deal the images of this split only and leave out the others; null deals all
        seed: of the order in which a scene's images take turns at being tested
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
                f"--test {self.test} and --validation {self.validation} are shares that leave some to train"
            )
        if self.train is not None and not 0 < self.train <= 1:
            raise ValueError(f"--train {self.train} is a share of each scene's images, above 0 and up to 1")


COMMANDS: dict[str, type[Any]] = {"sweep": SweepConfig, "resplit": ResplitConfig}
POSITIONAL = {"sweep": "name"}
