"""Options: nearest keys, precedence, types in YAML, round trips, the launcher's --local_rank."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from priorclip.common.options import known_keys, nearest, parse, parse_command, plain_words, without_local_rank


@dataclass
class Optimizer:
    """AdamW.

    Args:
        lr: peak learning rate
        weight_decay: decoupled decay
        betas: momenta
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass
class Config:
    """Train a thing.

    Args:
        dir: folder to write
        shards: one pattern or several
        dry_run: print only
        preset: size
        optimizer: how
        extra: anything
    """

    dir: str
    shards: str | list[str] | None = None
    dry_run: bool = False
    preset: str = "small"
    optimizer: Optimizer = field(default_factory=Optimizer)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Pack:
    """Pack shards.

    Args:
        shards: folder
        max_side: pixels
    """

    shards: str
    max_side: int | None = None


def refused(capsys: pytest.CaptureFixture[str], *words: str, command: bool = False) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_command({"pack": Pack, "train": Config}, words, prog="x") if command else parse(Config, words, prog="x")
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--optimizer.weigth_decay", "did you mean 'optimizer.weight_decay'?"),
        ("--optimizer.wd", "did you mean 'optimizer.weight_decay'?"),
        ("--lr", "did you mean 'optimizer.lr'?"),
        ("--shard", "did you mean 'shards'?"),
        ("--qqqqqq", "known keys: dir, dry_run, extra"),
    ],
)
def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str], word: str, hint: str) -> None:
    message = refused(capsys, "--dir", "d", word, "1")
    assert f"unknown key '{word[2:]}'" in message
    assert hint in message


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("optimizer: {lrr: 1}", "unknown key 'optimizer.lrr': did you mean 'optimizer.lr'?"),
        ("shrads: a.tar", "did you mean 'shards'?"),
    ],
)
def test_unknown_key_in_a_file_names_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, hint: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"dir: d\n{content}\n")
    assert hint in refused(capsys, "--config", str(path))


def test_an_option_of_one_letter_may_have_one_dash() -> None:
    @dataclass
    class Search:
        """Searches."""

        text: str
        k: int = 10

    for words in (["-k", "3"], ["-k=3"], ["--k", "3"]):
        assert parse(Search, ["--text", "a", *words], prog="x") == Search("a", 3)
        assert parse_command({"s": Search}, ["s", "--text", "a", *words], prog="x") == ("s", Search("a", 3))


def test_one_dash_before_a_long_name_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    for words, command in ((["--dir", "d", "-extra", "1"], False), (["pack", "-shards", "s"], True)):
        assert f"unknown option '{words[-2]}': write '-{words[-2]}'" in refused(capsys, *words, command=command)


def test_later_files_override_earlier_ones_key_by_key(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("dir: a\noptimizer: {lr: 0.1, weight_decay: 0.5}\n")
    second.write_text("optimizer: {lr: 0.2}\n")
    config = parse(Config, ["--config", str(first), "--config", str(second)], prog="x")
    assert (config.dir, config.optimizer.lr, config.optimizer.weight_decay) == ("a", 0.2, 0.5)
    config = parse(Config, ["--config", str(second), "--config", str(first), "--dir", "c"], prog="x")
    assert (config.dir, config.optimizer.lr, config.optimizer.weight_decay) == ("c", 0.1, 0.5)


def test_unknown_option_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'max_side'?" in refused(capsys, "pack", "--shards", "s", "--max-sid", "3", command=True)


def test_missing_and_mistyped_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert "dir" in refused(capsys, "--dry-run")
    assert "optimizer.lr" in refused(capsys, "--dir", "d", "--optimizer.lr", "fast")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dry_run: maybe", "dry_run: expected bool, got maybe"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected float, got fast"),
        ("optimizer: {lr: null}", "optimizer.lr: expected float, got null"),
        ("optimizer: 3", "optimizer: expected keys of its own, such as optimizer.lr, got 3"),
        ("optimizer: [1]", "optimizer: expected keys of its own, such as optimizer.lr, got a list"),
        ("preset: [a]", "preset: expected str, got ['a']"),
        ("shards: {a: 1}", "shards: expected str, list[str], null, got {'a': 1}"),
        ("a: b: c", "this is no YAML file of 'key: value' lines"),
        ("- a", "this is no YAML file of 'key: value' lines"),
    ],
)
@pytest.mark.parametrize("defaults", [None, lambda given: {}])
def test_wrong_type_in_a_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str, defaults: Any
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        parse(Config, ["--config", str(path), "--dir", "d"], prog="x", defaults=defaults)
    assert capsys.readouterr().err == f"x: error: {path}: {message}\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2", "2"), ("2024-05-01", "2024-05-01"), ("1e-3", "1e-3"), ("yes", "yes"), ("0x1F", "0x1F")],
)
def test_text_in_a_file_needs_no_quotes(tmp_path: Path, value: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"dir: {value}\nshards: [{value}, b]\nextra: {{a: 2}}\noptimizer:\n")
    config = parse(Config, ["--config", str(path)], prog="x")
    assert config == Config(expected, [expected, "b"], extra={"a": 2})
    path.write_text(f"dir: {value}\nshards: null\noptimizer: {{lr: 1e-3}}\n")
    assert parse(Config, ["--config", str(path)], prog="x") == Config(expected, optimizer=Optimizer(1e-3))


def test_command_line_over_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("dir: from_file\npreset: big\noptimizer: {lr: 0.5, betas: [0.1, 0.2]}\n")

    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        assert given["preset"] == "big"
        return {"optimizer": {"weight_decay": 9.0, "lr": 7.0}, "extra": {"a": {"b": 1}}}

    words = ["--config", str(path), "--optimizer.lr", "0.25"]
    config = parse(Config, words, prog="x", defaults=defaults)
    assert config.dir == "from_file"
    assert config.optimizer == Optimizer(lr=0.25, weight_decay=9.0, betas=(0.1, 0.2))
    assert config.extra == {"a": {"b": 1}}


def test_default_that_is_no_key_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Config, ["--dir", "d"], prog="x", defaults=lambda given: {"optimizer": {"nothing": 1}})
    assert "optimizer.nothing" in capsys.readouterr().err


@given(
    lr=st.floats(1e-9, 10), text=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12),
    shards=st.none() | st.lists(st.sampled_from(["{a,b}-{0000..0031}.tar", "hf://x/y.tar", "7", "null", "yes"])),
)  # fmt: skip
def test_printed_configuration_reads_back(lr: float, text: str, shards: list[str] | None) -> None:
    config = Config("runs/1", shards, True, text, Optimizer(lr, betas=(0.5, 0.75)), {"nested": {"n": 1}})
    printed = yaml.safe_dump(yaml.safe_load(yaml.safe_dump({**asdict(config), "optimizer": plain(config.optimizer)})))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"options-{os.getpid()}.yaml"
    path.write_text(printed)
    try:
        assert parse(Config, ["--config", str(path)], prog="x") == config
    finally:
        path.unlink()


def plain(optimizer: Optimizer) -> dict[str, Any]:
    return {**asdict(optimizer), "betas": list(optimizer.betas)}


def test_print_config_round_trip(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--dir", "d", "--optimizer.betas", "[0.5, 0.6]", "--extra", '{"a": [1, 2]}', "--shards", '["a", "b"]']
    config = parse(Config, words, prog="x")
    with pytest.raises(SystemExit) as stop:
        parse(Config, [*words, "--print_config"], prog="x")
    assert stop.value.code in (0, None)
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse(Config, ["--config", str(path)], prog="x") == config


@pytest.mark.parametrize("words", [["--local_rank=3", "--dir", "d"], ["--dir", "d", "--local-rank", "3"]])
def test_local_rank_of_the_launcher(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert parse(Config, words, prog="x").dir == "d"
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert without_local_rank(words) == ["--dir", "d"]
    assert os.environ["LOCAL_RANK"] == "1", "a set variable stays"


def test_dashes_and_flags() -> None:
    assert parse(Config, ["--dir", "d", "--dry-run"], prog="x").dry_run is True
    assert parse(Config, ["--dry-run", "false", "--dir", "a-b"], prog="x") == Config("a-b")
    assert plain_words(["--optimizer.weight-decay=a-b", "-x-y"], Config) == ["--optimizer.weight_decay=a-b", "-x-y"]


def test_positional_field_of_a_command() -> None:
    commands = {"pack": Pack, "train": Config}
    wanted = ("pack", Pack("folder", 7))
    assert (
        parse_command(commands, ["pack", "folder", "--max-side", "7"], prog="x", positional={"pack": "shards"})
        == wanted
    )
    words = ["pack", "--max_side", "7", "--shards", "folder"]
    assert parse_command(commands, words, prog="x", positional={"pack": "shards"}) == wanted


def test_nearest_prefers_the_own_group() -> None:
    known = ["model.text.width", "model.vision.width", "model.vision.depth", "width"]
    assert nearest("model.vision.with", known) == "model.vision.width"
    assert nearest("model.text.wdith", known) == "model.text.width"
    assert nearest("zzzz", known) is None


def test_known_keys_are_leaves() -> None:
    from priorclip.common.options import Parser, fill_parser

    parser = Parser(prog="x")
    fill_parser(parser, Config, [], None)
    keys = known_keys(parser)
    assert "optimizer.lr" in keys
    assert "optimizer" not in keys
    assert "help" not in keys
