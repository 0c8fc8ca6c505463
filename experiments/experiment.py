"""Experiments by name: each YAML in ``experiments/rows`` is one row of a table, and says what it reproduces.

    families: {belief: 2}                       # tables that it stands in, and its place there; 0 is the baseline
    label: soft belief                          # how the row is called there
    reproduces: PriorITR with soft belief, closed domain, RSITMD
    published: {mean_recall: 38.24, source: ...}   # or: not found
    steps:                                      # one training after the other
      - command: closed
        options: {data: {shards: "{rsitmd_train}"}, model: {belief: {mode: soft}}}

Names in braces are places: ``{seed}``, ``{run}`` (the folder of the run, whose steps are ``{run}/COMMAND``), and those
of a data file in ``experiments/data``, which says where shards and weights are, and the recipe that an experiment's
options change: so the same family runs on other data, with other encoders and another recipe.

    rows = family("belief")
    commands = commands_of(rows[0], load_data("ucmerced"), seed=0, run=Path("runs/x"))
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from priorclip.model.config import from_dict

HERE = Path(__file__).parent
EXPERIMENTS, STUDIES, DATA = HERE / "rows", HERE / "studies", HERE / "data"
PAPER_TOKENS = 49  # of Swin-T at 224 pixels, of which the paper's filter sizes are a share
TRAININGS = ("prior", "closed", "instruct", "pretrain")
WHOLE = ("kwargs", "config", "classes")  # options that are values of their own
PLACE = re.compile(r"\{(\w+)\}")

Options = dict[str, Any]
T = TypeVar("T")


@dataclass
class Step:
    """One training: the command (prior, closed, instruct, or pretrain) and its options, nested as in a YAML file."""

    command: str
    options: Options = field(default_factory=dict)


@dataclass
class Experiment:
    """One row; see the module's docstring."""

    families: dict[str, int]
    label: str
    reproduces: str
    published: Any
    steps: list[Any]
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.families, dict):
            raise ValueError(f"families are tables and places in them, {{belief: 2}} say, not {self.families!r}")
        self.steps = [from_dict(Step, step) if isinstance(step, dict) else step for step in self.steps]
        unknown = [step for step in self.steps if getattr(step, "command", None) not in TRAININGS]
        if unknown or not self.steps:
            raise ValueError(f"experiment {self.name}: steps need the command {', '.join(TRAININGS)}")


@dataclass
class DataFile:
    """Where things are, and what is set over the experiments' options.

    Args:
        places: what names in braces stand for
        defaults: options of every experiment by command, under its own; ``all`` for every command
        options: options over its own, likewise
        tokens: visual tokens of its backbone: filter sizes k, of the paper's 49, are scaled to it; null: as they are
        note: what is other than in the paper
    """

    places: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Options] = field(default_factory=dict)
    options: dict[str, Options] = field(default_factory=dict)
    tokens: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.places, dict):
            raise ValueError(f"places are names and what they stand for, not {self.places!r}")
        self.places = {str(name): str(place) for name, place in self.places.items()}  # 21 is written as "21" is
        if self.tokens is not None and not (isinstance(self.tokens, int) and self.tokens > 0):
            raise ValueError(f"tokens is how many visual tokens there are, or null, not {self.tokens!r}")
        for part in ("defaults", "options"):
            by_command = getattr(self, part)
            if not isinstance(by_command, dict) or not all(isinstance(each, dict) for each in by_command.values()):
                raise ValueError(f"{part} are options by command, {{closed: {{run: {{epochs: 2}}}}}} say")
            unknown = [name for name in by_command if name not in ("all", *TRAININGS)]
            if unknown:
                raise ValueError(f"{part}: '{unknown[0]}' is no command; there are all, {', '.join(TRAININGS)}")


def experiment_names() -> list[str]:
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """Raises ValueError that names the file and the key that is wrong."""
    return read(Experiment, EXPERIMENTS / f"{name}.yaml", name=name)


def read(kind: type[T], path: Path, **own: Any) -> T:
    """The dataclass that a YAML file holds, with values of its own. Raises ValueError that names file and key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict):
            raise ValueError(f"needs keys and values, but holds {content!r:.60}")
        return from_dict(kind, {**content, **own})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def family(name: str) -> list[Experiment]:
    """The experiments of a family, its baseline first, or the one of that name.

    Raises ValueError that names the nearest family or experiment.
    """
    known = [load_experiment(each) for each in experiment_names()]
    rows = [each for each in known if name in each.families]
    rows = sorted(rows, key=lambda row: row.families[name]) or [each for each in known if name == each.name]
    if not rows:
        studies = {path.stem for path in STUDIES.glob("*.yaml")}
        names = sorted({each for row in known for each in row.families} | {row.name for row in known} | studies)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise ValueError(
            f"no family, study or experiment '{name}': did you mean '{near[0]}'? There are {', '.join(names)}"
        )
    return rows


def load_data(name: str) -> DataFile:
    """A data file by its name in ``experiments/data``, or by its path. ValueError where it is neither, or wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else DATA / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in DATA.glob("*.yaml")))
        raise ValueError(f"--data {name}: neither a YAML file nor one of {names}")
    return read(DataFile, path)


def commands_of(
    row: Experiment, data: DataFile, *, seed: int, run: Path, extra: Options | None = None
) -> list[tuple[Path, list[str]]]:
    """The folder and the words after ``python -m`` of each training of a row.

    Args:
        row: the experiment
        data: where things are, and what is set over the experiment's options
        seed: of the run
        run: folder of the run
        extra: set over everything
    Raises:
        ValueError: a place that the data file does not name.
    """
    places = {**data.places, "seed": str(seed), "run": str(run)}
    commands = []
    for step in row.steps:
        folder = run / step.command
        under, over = (
            merged(each.get("all", {}), each.get(step.command, {})) for each in (data.defaults, data.options)
        )
        own = {"run": {"dir": str(folder), "seed": seed}}
        options = merged(under, step.options, over, extra or {}, own)
        scale_filter(options, data.tokens)
        module = ["pretrain"] if step.command == "pretrain" else ["finetune", step.command]
        commands.append((folder, [*module, *words_of(filled(options, places, row.name))]))
    return commands


def merged(*layers: Options) -> Options:
    """Nested options, later ones win. ValueError where one value is given for what holds options."""
    result: Options = {}
    for layer in layers:
        for key, value in layer.items():
            earlier = result.get(key)
            if (
                key not in WHOLE
                and None not in (earlier, value)
                and isinstance(earlier, dict) != isinstance(value, dict)
            ):
                raise ValueError(f"options: '{key}' is given as {earlier!r:.60} and as {value!r:.60}")
            both = isinstance(value, dict) and isinstance(result.get(key), dict) and key not in WHOLE
            result[key] = merged(result[key], value) if both else merged(value) if isinstance(value, dict) else value
    return result


def scale_filter(options: Options, tokens: int | None) -> None:
    """The filter size k, given for the paper's 49 tokens, as the same share of the backbone's."""
    belief = options.get("model", {}).get("belief", {})
    if tokens is not None and belief.get("k") is not None:
        belief["k"] = max(1, round(belief["k"] * tokens / PAPER_TOKENS))


def filled(value: Any, places: dict[str, str], where: str) -> Any:
    """The value with names in braces replaced, also within what they stand for."""
    if isinstance(value, dict):
        return {key: filled(item, places, where) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, places, where) for item in value]
    if not isinstance(value, str):
        return value
    for _ in range(len(places) + 1):
        missing = [name for name in PLACE.findall(value) if name not in places]
        if missing:
            raise ValueError(
                f"experiment {where}: no place '{missing[0]}' in the data file; it has {', '.join(places)}"
            )
        text = PLACE.sub(lambda found: places[found[1]], value)
        if text == value:
            return text
        value = text
    raise ValueError(f"experiment {where}: places of the data file that stand for each other: {value[:120]}")


def words_of(options: Options, prefix: str = "") -> list[str]:
    """Nested options as ``--a.b value``."""
    words: list[str] = []
    for key, value in options.items():
        if isinstance(value, dict) and key not in WHOLE:
            words += words_of(value, f"{prefix}{key}.")
        else:
            words += [f"--{prefix}{key}", value if isinstance(value, str) else json.dumps(value)]
    return words
