"""The YAML files of rows, studies and data: each builds its model, and an error in one is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from real_trainings import run

from priorclip.common.options import parse, parse_command
from priorclip.experiments.commands import SweepConfig
from priorclip.experiments.experiment import (
    DATA,
    EXPERIMENTS,
    STUDIES,
    commands_of,
    experiment_names,
    family,
    load_data,
    load_experiment,
    merge_options,
    scale_filter,
)
from priorclip.experiments.study import RowAtLevel, load_study, row_at_level, study_names
from priorclip.experiments.sweep import sweep
from priorclip.finetune.commands import COMMANDS, DEFAULTS
from priorclip.model import build_model
from priorclip.model.config import ModelConfig
from priorclip.model.encoders.text import resolve
from priorclip.pretrain.commands import PretrainConfig, model_defaults


def parsed(words: list[str]):
    """Returns the configuration of a command of a sweep."""
    if words[0] == "pretrain":
        return parse(PretrainConfig, words[1:], prog="pretrain", defaults=model_defaults)
    return parse_command(COMMANDS, words[1:], prog="finetune", defaults=DEFAULTS)[1]


# Configuration -> has its model belief? Several rows differ only in their losses.
BUILT: dict[str, bool] = {}


def builds_with_belief(config: ModelConfig) -> bool:
    """Builds the model of the configuration. Tells whether it has belief."""
    key = json.dumps(asdict(config), sort_keys=True)
    if key not in BUILT:
        with torch.device("meta"):
            BUILT[key] = getattr(build_model(config), "has_belief", False)
    return BUILT[key]


# Rows that need data that UC Merced does not have.
RSICD = ("closed-full-rsicd", "closed-baseline-rsicd", "open-soft-rsicd", "open-soft-ret2", "open-soft-ret3",
         "scene-prior", "prior-resnet18")  # fmt: skip


@pytest.mark.parametrize(
    ("data", "name"),
    [(data, name) for data in ("default", "ucmerced") for name in experiment_names()
     if data == "default" or name not in RSICD],
)  # fmt: skip
def test_every_experiment_parses_and_builds(name: str, data: str, tmp_path: Path) -> None:
    row = load_experiment(name)
    places = load_data(data)
    for folder, words in commands_of(row, places, seed=3, run=tmp_path):
        at = words.index("--init_from") if "--init_from" in words else None
        if at is not None:  # stage one's export does not exist: write its architecture
            first = parsed(commands_of(row, places, seed=3, run=tmp_path)[0][1])
            (tmp_path / "pretrain" / "export").mkdir(parents=True, exist_ok=True)
            first.model.text = resolve(first.model.text)
            values = {"format": 1, **json.loads(json.dumps(first.model, default=vars))}
            (tmp_path / "pretrain" / "export" / "config.json").write_text(json.dumps(values))
        config = parsed(words)
        assert (config.run.dir, config.run.seed) == (str(folder), 3)
        if hasattr(config, "model"):
            for encoder in (config.model.vision, config.model.prior, config.model.text):
                encoder.weights = None
            has_belief = builds_with_belief(config.model)
            if config.model.kind == "prioritr":
                assert has_belief == (config.model.pae.spatial_layers > 0)
            if has_belief and config.model.belief.mode == "hard":
                assert 1 <= config.model.belief.k <= 49


def test_every_experiment_names_what_it_reproduces_and_the_figure() -> None:
    assert len(experiment_names()) > 30
    for name in experiment_names():
        row = load_experiment(name)
        assert row.label
        assert row.reproduces
        if isinstance(row.published, dict):
            assert row.published["source"]
            assert 0 < row.published["mean_recall"] < 100
        else:
            assert any(word in row.published for word in ("not found", "control")), name
    wanted = {"closed", "open", "belief-closed", "belief-open", "filter-size", "spatial-layers", "temporal-cycles",
              "lambda-cs", "prior-encoder", "losses", "modules", "stages", "open-paper"}  # fmt: skip
    families = [row.families for row in map(load_experiment, experiment_names())]
    assert wanted <= {name for each in families for name in each}
    for name in {name for each in families for name in each}:
        places = [row.families[name] for row in family(name)]
        assert places == sorted(set(places)), f"two rows of {name} have the same place"
        assert places[0] == 0, f"{name} has no baseline"


def test_places_and_options_are_filled_in(tmp_path: Path) -> None:
    row = load_experiment("open-soft")
    (one, first), (two, second) = commands_of(
        row, load_data("ucmerced"), seed=7, run=tmp_path, extra={"run": {"epochs": 9}}
    )
    assert (one, two) == (tmp_path / "pretrain", tmp_path / "instruct")
    assert second[second.index("--init_from") + 1] == str(tmp_path / "pretrain" / "export")
    for words in (first, second):
        assert words[words.index("--run.epochs") + 1] == "9"
        assert words[words.index("--run.seed") + 1] == "7"
        assert not any("{" in word for word in words)
    options = {"model": {"belief": {"k": 40}}}
    scale_filter(options, 25)
    assert options["model"]["belief"]["k"] == 20
    assert merge_options({"a": {"b": 1, "kwargs": {"x": 1}}}, {"a": {"c": 2, "kwargs": {"y": 2}}}) == {
        "a": {"b": 1, "c": 2, "kwargs": {"y": 2}}}  # fmt: skip


def test_every_study_sets_its_level_and_nothing_else(tmp_path: Path) -> None:
    """Each run has the configuration of the experiment, except the level. At level 0 both are equal."""
    noises = {"caption-noise", "few-captions", "label-noise", "prior-noise"}
    assert set(study_names()) == noises | {"scaling-images", "scaling-scenes", "long-tail", "captions-per-image"}
    data = load_data("ucmerced")
    for study in map(load_study, sorted(noises)):
        first, *_, row = study.experiments()
        parts = [
            RowAtLevel(row, tmp_path, data, {}),
            *(row_at_level(study, level, row, data, tmp_path, {}) for level in (0, 0.4)),
        ]
        assert [part.folder.name for part in parts[1:]] == ["clean", f"{study.name}-0.4"]
        ((_, plain),), ((_, clean),), ((_, noisy),) = (
            commands_of(row, part.data, seed=3, run=tmp_path, extra=part.options) for part in parts
        )
        assert clean == plain
        plain, noisy = (vars(parsed(words)) for words in (plain, noisy))
        changed = {
            f"{group}.{key}": value
            for group in ("run", "data", "model", "loss", "test")
            for key, value in vars(noisy[group]).items() if value != vars(plain[group])[key]
        }  # fmt: skip
        if study.name == "few-captions":
            assert changed.pop("run.engine").global_batch == 21
            assert changed == {
                "data.shards": "runs/evidence/folds-less-0.4/split-3/train", "run.epochs": 1000, "run.max_steps": 120,
            }  # fmt: skip
            continue
        if study.name != "prior-noise":
            assert changed == {f"data.{study.name.replace('-', '_')}": 0.4}
            assert parts[2].first is None
            continue
        assert row_at_level(study, 0.4, first, data, tmp_path, {}) == row_at_level(study, 0, first, data, tmp_path, {})
        assert list(changed) == ["model.prior"]
        folder, words = parts[2].first
        taught = parsed(words)
        assert changed["model.prior"].weights == f"{taught.run.dir}/export" == f"{folder}/export"
        assert (taught.data.label_noise, taught.backbone.unlocked) == (0.4, 10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beliefs"], "did you mean 'belief"),
        (["modules", "--data", "ucmercd"], "ucmerced"),
        (["closed", "--data", "ucmerced"], "no place 'rsicd_train'"),
        (["few-captions", "--data", "default"], "no place 'few'"),
        (["modules", "--seeds", "0"], "--seeds"),
        (["modules", "--options", "{run: 5}"], "'run' is given as 5 and as {'dir': "),
        (["modules", "--levels", "[0.1]"], "'modules' is no study; there are caption-noise"),
        (
            ["belief-closed", "--rows", "[closed-soft,closed-hard]"],
            "'belief-closed' has no 'closed-hard'; its rows are",
        ),
        (["prior-noise", "--rows", "[one-stage-no-prior,no-belief]"], "'prior-noise' has no 'no-belief'; its rows"),
    ],
)
def test_an_error_is_named(words: list[str], message: str) -> None:
    done = run("finetune", "sweep", *words, "--dry-run")
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", r"own.yaml: needs keys and values"),
        ("places: [a]", "places must map names to values"),
        ("tokens: four", "tokens must be the number of visual tokens"),
        ("defaults: {closed: 3}", "defaults must be options by command"),
        ("options: {closd: {run: {epochs: 3}}}", "'closd' is no command; there are all, prior"),
        ('places: {train: "{test}", test: "{train}", prior: x}', "that refer to each other"),
        ("places: {test: x, train: y}\ndefaults: {closed: {data: {shards: z}}}", "would measure nothing"),
    ],
)
def test_an_error_in_a_data_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    """Before the first training, because some errors would show only in the table at the end, or never."""
    (tmp_path / "own.yaml").write_text(content)
    options = {"data": {"shards": "{train}"}} if "each other" in message else {}
    config = SweepConfig("closed-full", data=str(tmp_path / "own.yaml"), options=options, output=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        sweep(config)


def test_files_are_where_they_are_packaged() -> None:
    assert {path.suffix for path in [*EXPERIMENTS.iterdir(), *STUDIES.iterdir(), *DATA.iterdir()]} == {".yaml"}
