"""Experiments by name: each YAML file in ``experiments/rows`` is one row of a table and says what it reproduces.

    families: {belief: 2}                       # tables with this row, and its place there; 0 is the baseline
    label: soft belief                          # name of the row in the table
    reproduces: PriorITR with soft belief, closed domain, RSITMD
    published: {mean_recall: 38.24, source: ...}   # or: not found
    steps:                                      # trainings, one after the other
      - command: closed
        options: {data: {shards: "{rsitmd_train}"}, model: {belief: {mode: soft}}}

Names in braces are replaced: ``{seed}``, ``{run}`` (the folder of the run; its trainings are ``{run}/COMMAND``), and
names of a data file in ``experiments/data``. A data file says where shards and weights are, and gives the recipe that
an experiment's options change. So the same family runs on other data, with other encoders and another recipe.

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
PAPER_TOKENS = 49  # tokens of Swin-T at 224 pixels, which the paper's filter sizes refer to
TRAININGS = ("prior", "closed", "instruct", "pretrain")
WHOLE = ("kwargs", "config", "classes")  # options whose value is a mapping
NAME_IN_BRACES = re.compile(r"\{(\w+)\}")

Options = dict[str, Any]
T = TypeVar("T")


@dataclass
class Step:
    """One training: the command (prior, closed, instruct or pretrain) and its options, nested as in a YAML file."""

    command: str
    options: Options = field(default_factory=dict)


@dataclass
class Experiment:
    """One row, as the module's docstring describes it."""

    families: dict[str, int]
    label: str
    reproduces: str
    published: Any
    steps: list[Any]
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.families, dict):
            raise ValueError(f"families must map tables to places, such as {{belief: 2}}, not {self.families!r}")
        self.steps = [from_dict(Step, step) if isinstance(step, dict) else step for step in self.steps]
        unknown = [step for step in self.steps if getattr(step, "command", None) not in TRAININGS]
        if unknown or not self.steps:
            raise ValueError(f"experiment {self.name}: the command of a step must be one of {', '.join(TRAININGS)}")


@dataclass
class DataFile:
    """Where shards and weights are, and options for all experiments.

    Args:
        places: values of the names in braces
        defaults: options of every experiment by command, which an experiment can override; ``all``: every command
        options: options that override those of the experiments, by command in the same way
        tokens: number of visual tokens of the backbone; filter sizes k are scaled from the paper's 49 tokens to it.
            null: not scaled
        note: differences to the paper
    """

    places: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Options] = field(default_factory=dict)
    options: dict[str, Options] = field(default_factory=dict)
    tokens: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.places, dict):
            raise ValueError(f"places must map names to values, not {self.places!r}")
        self.places = {str(name): str(place) for name, place in self.places.items()}  # YAML reads 21 as a number
        if self.tokens is not None and not (isinstance(self.tokens, int) and self.tokens > 0):
            raise ValueError(f"tokens must be the number of visual tokens, or null, not {self.tokens!r}")
        for part in ("defaults", "options"):
            by_command = getattr(self, part)
            if not isinstance(by_command, dict) or not all(isinstance(each, dict) for each in by_command.values()):
                raise ValueError(f"{part} must be options by command, such as {{closed: {{run: {{epochs: 2}}}}}}")
            unknown = [name for name in by_command if name not in ("all", *TRAININGS)]
            if unknown:
                raise ValueError(f"{part}: '{unknown[0]}' is no command; there are all, {', '.join(TRAININGS)}")


def experiment_names() -> list[str]:
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """Reads an experiment. The ValueError for a wrong file names the file and the key."""
    return read_yaml(Experiment, EXPERIMENTS / f"{name}.yaml", name=name)


def read_yaml(kind: type[T], path: Path, **own: Any) -> T:
    """Reads a YAML file into a dataclass; ``own`` overrides its keys. The ValueError names the file and the key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict):
            raise ValueError(f"needs keys and values, but holds {content!r:.60}")
        return from_dict(kind, {**content, **own})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def family(name: str) -> list[Experiment]:
    """Returns the experiments of a family, the baseline first, or the one experiment of that name.

    Raises:
        ValueError: there is neither; the message names the nearest family or experiment.
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
    """Reads a data file, by its name in ``experiments/data`` or by its path. Raises ValueError if neither exists."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else DATA / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in DATA.glob("*.yaml")))
        raise ValueError(f"--data {name}: neither a YAML file nor one of {names}")
    return read_yaml(DataFile, path)


def commands_of(
    row: Experiment, data: DataFile, *, seed: int, run: Path, extra: Options | None = None
) -> list[tuple[Path, list[str]]]:
    """Returns the folder and the command line, after ``python -m``, of each training of a row.

    Args:
        row: the experiment
        data: where shards and weights are, and options for all experiments
        seed: seed of the run
        run: folder of the run
        extra: options that override all others
    Raises:
        ValueError: the data file gives no value for a name in braces.
    """
    places = {**data.places, "seed": str(seed), "run": str(run)}
    commands = []
    for step in row.steps:
        folder = run / step.command
        under, over = (
            merge_options(each.get("all", {}), each.get(step.command, {})) for each in (data.defaults, data.options)
        )
        own = {"run": {"dir": str(folder), "seed": seed}}
        options = merge_options(under, step.options, over, extra or {}, own)
        scale_filter(options, data.tokens)
        module = ["pretrain"] if step.command == "pretrain" else ["finetune", step.command]
        commands.append((folder, [*module, *option_words(fill_names(options, places, row.name))]))
    return commands


def merge_options(*layers: Options) -> Options:
    """Merges nested options; later ones win. Raises ValueError if a key is a value in one and options in another."""
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
            result[key] = (
                merge_options(result[key], value)
                if both
                else merge_options(value)
                if isinstance(value, dict)
                else value
            )
    return result


def scale_filter(options: Options, tokens: int | None) -> None:
    """Scales the filter size k from the paper's 49 tokens to the same share of the backbone's tokens."""
    belief = options.get("model", {}).get("belief", {})
    if tokens is not None and belief.get("k") is not None:
        belief["k"] = max(1, round(belief["k"] * tokens / PAPER_TOKENS))


def fill_names(value: Any, places: dict[str, str], where: str) -> Any:
    """Replaces the names in braces of a value, also those inside their replacements."""
    if isinstance(value, dict):
        return {key: fill_names(item, places, where) for key, item in value.items()}
    if isinstance(value, list):
        return [fill_names(item, places, where) for item in value]
    if not isinstance(value, str):
        return value
    for _ in range(len(places) + 1):
        missing = [name for name in NAME_IN_BRACES.findall(value) if name not in places]
        if missing:
            raise ValueError(
                f"experiment {where}: no place '{missing[0]}' in the data file; it has {', '.join(places)}"
            )
        text = NAME_IN_BRACES.sub(lambda found: places[found[1]], value)
        if text == value:
            return text
        value = text
    raise ValueError(f"experiment {where}: places of the data file that refer to each other: {value[:120]}")


def option_words(options: Options, prefix: str = "") -> list[str]:
    """Returns nested options as command-line words ``--a.b value``."""
    words: list[str] = []
    for key, value in options.items():
        if isinstance(value, dict) and key not in WHOLE:
            words += option_words(value, f"{prefix}{key}.")
        else:
            words += [f"--{prefix}{key}", value if isinstance(value, str) else json.dumps(value)]
    return words
