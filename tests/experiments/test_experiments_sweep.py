"""Experiments by name: every YAML builds its model; a small sweep really runs, and is not run twice."""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from real_trainings import run, run_well

from priorclip.common.options import parse, parse_command
from priorclip.experiments.commands import ResplitConfig, SweepConfig
from priorclip.experiments.experiment import (  # fmt: skip
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
from priorclip.experiments.resplit import deal, resplit
from priorclip.experiments.study import RowAtLevel, Study, load_study, row_at_level, study_names
from priorclip.experiments.study_table import write_study
from priorclip.experiments.sweep import Command, average_folds, find_repeated, finished, run_plans, sweep
from priorclip.experiments.sweep_table import plus_minus, summary, write_table
from priorclip.finetune.commands import COMMANDS, DEFAULTS
from priorclip.model import build_model
from priorclip.model.config import ModelConfig
from priorclip.pretrain.commands import PretrainConfig, model_defaults


def parsed(words: list[str]):
    """The configuration that a command of a sweep is run with."""
    if words[0] == "pretrain":
        return parse(PretrainConfig, words[1:], prog="pretrain", defaults=model_defaults)
    return parse_command(COMMANDS, words[1:], prog="finetune", defaults=DEFAULTS)[1]


BUILT: dict[str, bool] = {}


def build_and_ask(config: ModelConfig) -> bool:
    """Whether the model of this configuration, which is built, has belief; several rows differ in their losses only."""
    key = json.dumps(asdict(config), sort_keys=True)
    if key not in BUILT:
        with torch.device("meta"):
            BUILT[key] = getattr(build_model(config), "has_belief", False)
    return BUILT[key]


RSICD = ("closed-full-rsicd", "open-soft-rsicd", "open-soft-ret2", "open-soft-ret3", "scene-prior", "prior-resnet18")


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
        if at is not None:  # stage one's export, which is not there: its architecture
            first = parsed(commands_of(row, places, seed=3, run=tmp_path)[0][1])
            (tmp_path / "pretrain" / "export").mkdir(parents=True, exist_ok=True)
            values = {"format": 1, **json.loads(json.dumps(first.model, default=vars))}
            (tmp_path / "pretrain" / "export" / "config.json").write_text(json.dumps(values))
        config = parsed(words)
        assert (config.run.dir, config.run.seed) == (str(folder), 3)
        if hasattr(config, "model"):
            for encoder in (config.model.vision, config.model.prior, config.model.text):
                encoder.weights = None
            has_belief = build_and_ask(config.model)
            if config.model.kind == "prioritr":
                assert has_belief == (config.model.pae.spatial_layers > 0)
            if has_belief and config.model.belief.mode == "hard":
                assert 1 <= config.model.belief.k <= 49


def test_every_experiment_says_what_it_reproduces_and_the_figure() -> None:
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
              "lambda-cs", "prior-encoder", "losses", "modules", "stages"}  # fmt: skip
    families = [row.families for row in map(load_experiment, experiment_names())]
    assert wanted <= {name for each in families for name in each}
    for name in {name for each in families for name in each}:
        places = [row.families[name] for row in family(name)]
        assert places == sorted(set(places)), f"two rows of {name} have one place"
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
    """The configuration of each run is that of the experiment, but for the level; at level 0 it is the experiment's."""
    assert set(study_names()) == {"caption-noise", "few-captions", "label-noise", "prior-noise"}
    data = load_data("ucmerced")
    for study in map(load_study, study_names()):
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
def test_what_is_wrong_is_named(words: list[str], message: str) -> None:
    done = run("finetune", "sweep", *words, "--dry-run")
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", r"own.yaml: needs keys and values"),
        ("places: [a]", "places are names"),
        ("tokens: four", "tokens is how many"),
        ("defaults: {closed: 3}", "defaults are options by command"),
        ("options: {closd: {run: {epochs: 3}}}", "'closd' is no command; there are all, prior"),
        ('places: {train: "{test}", test: "{train}", prior: x}', "that stand for each other"),
        ("places: {test: x, train: y}\ndefaults: {closed: {data: {shards: z}}}", "would measure nothing"),
    ],
)
def test_what_is_wrong_in_a_data_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    """Before anything is run: some of it would be found out by the table at the end, or never."""
    (tmp_path / "own.yaml").write_text(content)
    options = {"data": {"shards": "{train}"}} if "each other" in message else {}
    config = SweepConfig("closed-full", data=str(tmp_path / "own.yaml"), options=options, output=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        sweep(config)


def test_a_run_that_failed_at_once_does_not_hold_its_folder(tmp_path: Path) -> None:
    """A misspelt option leaves a folder with the words of the run in it; the same sweep with it mended goes on."""
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "sweep.json").write_text(
        json.dumps(["finetune", "closed", "--run.dir", str(folder), "--run.epohcs", "2"])
    )
    mended = ["finetune", "closed", "--run.dir", str(folder), "--run.epochs", "2"]
    assert not finished(folder, mended)
    (folder / "checkpoints/step-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="other options"):
        finished(folder, mended)


def test_one_pretraining_serves_all_rows_that_begin_with_it(tmp_path: Path) -> None:
    data = load_data("default")

    def plans(name: str) -> list[list[Command]]:
        return [commands_of(row, data, seed=seed, run=tmp_path / row.name / str(seed))
                for seed in (0, 1) for row in family(name)]  # fmt: skip

    rows = [row.name for row in family("open")]
    same = find_repeated(plans("open"))
    assert {folder: original for folder, (original, _) in same.items()} == {
        tmp_path / name / seed / "pretrain": tmp_path / rows[0] / seed / "pretrain"
        for name in rows[1:]
        for seed in "01"
    }
    assert not find_repeated(plans("belief-open")), "each is pretrained in its own way"
    (tmp_path / rows[1] / "0" / "pretrain").mkdir(parents=True)
    assert len(find_repeated(plans("open"))) == len(same) - 1, "one that has been run stays"
    # The first has its report already: what the third takes from it is a link, and nothing is lost.
    (folder, words), (other, others) = plans("open")[0][0], plans("open")[2][0]
    (folder / "export").mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    (folder / "sweep.json").write_text(json.dumps(words))
    for _ in range(2):
        begun = {folder: [(folder, words)], other: [(other, others)]}
        assert not run_plans(begun, SweepConfig("open", keep="report"), find_repeated(plans("open")))
        assert other.is_symlink()
        assert (other / "export").is_dir()
    # So has a sweep of the third row alone, whose folder is that link.
    assert not run_plans({other: [(other, others)]}, SweepConfig("open"))
    with pytest.raises(ValueError, match="other options"):
        run_plans({other: [(other, [*others, "--run.epochs", "1"])]}, SweepConfig("open"))


def test_spread_and_paired_differences(tmp_path: Path) -> None:
    """Seeds that shift both rows alike: the paired difference has no spread."""
    rows = [load_experiment("closed-baseline"), load_experiment("closed-full"), load_experiment("closed-soft")]
    results = {
        rows[0].name: {s: {"mean_recall": 50.0 + s} for s in range(3)},
        rows[1].name: {s: {"mean_recall": 54.5 + s} for s in range(1, 4)},
        rows[2].name: {},
    }
    found = summary(rows[1], rows, results)
    assert found["figures"]["mean_recall"]["mean"] == pytest.approx(56.5)
    assert found["figures"]["mean_recall"]["spread"] == pytest.approx(1.0)
    assert found["difference"] == {"mean": pytest.approx(4.5), "spread": pytest.approx(0.0), "count": 2}
    write_table("t", rows, results, tmp_path, "a note", "the command")
    text = (tmp_path / "t.md").read_text()
    assert "| 56.5 ± 1.0 | +4.5 ± 0.0 | 3 |" in text
    other = load_experiment("closed-full-rsicd")  # tested on other images: no difference to take
    alone = summary(other, [rows[1], other], {**results, other.name: {1: {"mean_recall": 40.0}}})
    assert alone["difference"] is None
    assert plus_minus(alone["figures"]["mean_recall"]) == "40.0", "one run has no spread"
    scenes = {**results, rows[2].name: {2: {"accuracy": 75.0}}}  # a prior in a family of models
    assert summary(rows[2], rows, scenes)["difference"] is None
    write_table("mixed", rows, scenes, tmp_path, "", "the command")
    assert "|  | 75.0 |  | 1 |" in (tmp_path / "mixed.md").read_text()
    assert "38.24" in text
    assert "the command" in text
    assert "closed-soft" in text
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_a_study_pairs_seeds_at_each_level(tmp_path: Path) -> None:
    """No prior loses 10 points a level and the prior 8, on splits that are 1 point apart; one run is missing."""
    study = Study("why", "noise", [0, 0.5], {"plain": "no prior", "soft": "soft belief"}, ["plain"], {}, name="noise")
    recall = {"plain": lambda place, seed: 70.0 - 10 * place + seed, "soft": lambda place, seed: 70 - 8 * place + seed}
    results = {
        level: {
            row: {seed: {"mean_recall": of(place, seed)} for seed in range(3) if (row, level, seed) != ("soft", "0", 2)}
            for row, of in recall.items()
        }
        for place, level in enumerate(["0", "0.5"])
    }
    table = write_study(study, results, tmp_path, "a note", "the command")
    assert table["rows"]["plain"]["0"]["runs"] == {0: 70, 1: 71, 2: 72}
    gain = table["against"]["plain"]["soft"]
    assert (gain["0"]["mean"], gain["0"]["count"], gain["0.5"]["mean"], gain["0.5"]["count"]) == (0, 2, 2, 3)
    assert (gain["change"]["mean"], gain["change"]["spread"], gain["change"]["count"]) == (2, 0, 2)
    text = (tmp_path / "noise.md").read_text()
    assert "| 0 | 71.0 ± 1.0 (3) | 70.5 ± 0.7 (2) |" in text
    assert "| 0.5 less 0 | -10.0 ± 0.0 (0/3) | -8.0 ± 0.0 (0/2) |" in text
    assert "| less 'no prior' | soft belief |" in text
    assert "| 0.5 | +2.0 ± 0.0 (3/3) |" in text
    assert (tmp_path / "noise.png").stat().st_size > 5000


def test_resplit_deals_within_scenes() -> None:
    entries = [{"filename": f"{s}/{s}{n}.jpg", "split": "train"} for s in ("airport", "beach") for n in range(7)]
    one, two = deal(entries, 0.286, 0.15, seed=1), deal(entries, 0.286, 0.15, seed=2)
    for scene in ("airport", "beach"):
        own = [entry["split"] for entry in one if entry["filename"].startswith(scene)]
        assert (own.count("test"), own.count("val"), own.count("train")) == (2, 1, 4)
    assert one == deal(entries, 0.286, 0.15, seed=1) != two
    assert {entry["split"] for entry in entries} == {"train"}, "what was given is not changed"
    turns = [deal(entries, 0.286, 0.15, seed=1, turn=turn) for turn in range(7)]
    tested = Counter(entry["filename"] for turn in turns for entry in turn if entry["split"] == "test")
    assert set(tested.values()) == {2}, "seven turns test each of the 14 images twice"
    assert len(tested) == 14
    later = [deal(entries, 0.286, 0.15, seed=1, turn=turn) for turn in range(7, 14)]
    assert Counter(entry["filename"] for turn in later for entry in turn if entry["split"] == "test") == tested
    assert later != turns, "the second cross-validation has other splits"
    few = deal(entries, 0.286, 0.15, 0.143, seed=1)
    assert Counter(entry["split"] for entry in few) == {"test": 4, "val": 2, "train": 2}
    parts = [{entry["filename"]: entry["split"] for entry in each} for each in (few, one)]
    assert parts[0].items() <= parts[1].items(), "with less to train on the same images are tested"


def test_resplit_takes_class_numbers_and_names_the_file_that_is_wrong(tmp_path: Path) -> None:
    path, entries = tmp_path / "set.json", [{"filename": f"{n}.tif", "label": n % 2} for n in range(9)]
    path.write_text(json.dumps({"images": [*entries, {"filename": "beach_1.tif"}]}))
    config = ResplitConfig(json=str(path), output=str(tmp_path), count=2, test=0.25)
    dealt = [json.loads(split.read_text())["images"] for split in resplit(config)]
    assert all(Counter(entry["split"] for entry in each) == {"train": 8, "test": 2} for each in dealt)
    for wrong in ({"images": 5}, {"images": [{"split": "train"}]}, {"images": [5]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"set\.json"):
            resplit(config)


def test_a_cross_validation_is_one_figure() -> None:
    runs = {seed: {"mean_recall": float(seed), "classes": {}} for seed in (4, 5, 6, 7, 8)}
    config = SweepConfig(name="belief", seeds=6, first_seed=4, folds=3)
    assert average_folds(runs, config) == {0: {"mean_recall": 5.0}}, "the second lacks a split"
    assert average_folds(runs, SweepConfig(name="belief", seeds=6, first_seed=4)) == runs
    with pytest.raises(ValueError, match="--seeds 5 is no multiple of --folds 3"):
        SweepConfig(name="belief", seeds=5, folds=3)
    with pytest.raises(ValueError, match="--train 0 is a share"):
        ResplitConfig(json="a.json", output="b", train=0)


def test_a_study_runs_and_its_clean_level_is_the_family_not_run_twice(data: Path, prior: Path, tmp_path: Path) -> None:
    """Two rows at two levels of caption noise, on drawn scenes, by a data file of its own."""
    places = {
        "places": {
            "train": str(data / "train"), "test": str(data / "held-out"), "prior": str(prior / "export"),
            "open_preset": "priorclip-tiny",
        },
        "tokens": 4,
        "defaults": {
            "closed": {
                "tokenizer": str(data / "tokenizer"),
                "data": {"shards": "{train}", "image_size": 48, "workers": 0},
                "test": {"shards": "{test}"},
                "model": {
                    "vision": {"image_size": 48, "trainable": False, "remember": str(tmp_path / "features")},
                    "prior": {"image_size": 48, "weights": "{prior}"}, "text": {"context_length": 24},
                },
                "run": {"epochs": 1, "evaluate_every": 0, "progress": False,
                        "engine": {"zero": "0", "global_batch": 32, "threads": 1}},
            }
        },
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(places))
    words = ["finetune", "sweep", "caption-noise", "--rows", "[one-stage-no-prior,one-stage-hard]", "--keep", "export",
             "--levels", "[0,0.5]", "--seeds", 1, "--data", tmp_path / "own.yaml", "--output", tmp_path / "out",
    ]  # fmt: skip
    shown = run_well(*words, "--dry-run").splitlines()
    assert len(shown) == 4
    assert all(shlex.split(line)[1:4] == ["-m", "finetune", "closed"] for line in shown)
    run_well(*words)
    table = json.loads((tmp_path / "out" / "caption-noise.json").read_text())
    assert list(table["rows"]) == ["one-stage-no-prior", "one-stage-hard"]
    for row, level, part in itertools.product(table["rows"], ("0", "0.5"), ("clean", "caption-noise-0.5")):
        if (level == "0") == (part == "clean"):
            folder = tmp_path / "out" / part / row / "seed-0/closed"
            report = json.loads((folder / "report.json").read_text())
            assert table["rows"][row][level]["runs"] == {"0": report["test"]["mean_recall"]}
            assert ("50 % of the samples have" in folder.with_suffix(".log").read_text()) == (level == "0.5")
            assert (folder / "export" / "model.safetensors").is_file()
            assert not (folder / "checkpoints").exists()
    assert list((tmp_path / "features").rglob("*.safetensors"))

    folder = tmp_path / "out/clean/one-stage-hard/seed-0/closed"
    family_of_clean = SweepConfig(
        "belief-one-stage", rows=["one-stage-no-prior", "one-stage-hard"], seeds=1, data=str(tmp_path / "own.yaml"),
        output=str(tmp_path / "out/clean"),
    )  # fmt: skip
    written, length = (folder / "report.json").stat().st_mtime_ns, folder.with_suffix(".log").stat().st_size
    assert sweep(family_of_clean) == 0
    assert (folder / "report.json").stat().st_mtime_ns == written
    assert folder.with_suffix(".log").stat().st_size == length
    found = json.loads((tmp_path / "out/clean/belief-one-stage.json").read_text())
    assert [row["name"] for row in found["rows"]] == list(table["rows"])
    assert found["rows"][1]["figures"]["mean_recall"]["runs"] == table["rows"]["one-stage-hard"]["0"]["runs"]

    # A level's prior is there for all its runs, though of what is done the reports alone are kept.
    recipe = {
        "run": {
            "dir": "none",
            "epochs": 1,
            "evaluate_every": 0,
            "engine": {"zero": "0", "global_batch": 32, "threads": 1},
        },
        "data": {"shards": str(data / "train"), "image_size": 48, "workers": 0},
        "backbone": yaml.safe_load((prior / "config.yaml").read_text())["backbone"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places["places"]["scene_recipe"] = str(tmp_path / "recipe.yaml")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(places))
    taught = SweepConfig(
        "prior-noise", rows=["one-stage-soft"], levels=[0.5], seeds=1, keep="report", data=str(tmp_path / "own.yaml"),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    assert sweep(taught) == 0
    assert (tmp_path / "out/prior-noise-0.5/prior/export").is_dir()
    assert not (tmp_path / "out/prior-noise-0.5/one-stage-soft/seed-0/closed/export").exists()

    family_of_clean.options = {"run": {"epochs": 2}}
    with pytest.raises(ValueError, match="other options"):
        sweep(family_of_clean)


def test_files_are_where_they_are_packaged() -> None:
    assert {path.suffix for path in [*EXPERIMENTS.iterdir(), *STUDIES.iterdir(), *DATA.iterdir()]} == {".yaml"}
