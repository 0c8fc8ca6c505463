"""The command ``priorclip``: it reaches every sub-command of every package and hands on options and exit codes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
from real_trainings import ROOT, environment

from priorclip.__main__ import ALONE, COMMANDS, PACKAGES, main, usage
from priorclip.common import options

# Both names start the same command.
SAME = {("finetune", "sweep"): "experiments", ("finetune", "resplit"): "experiments"}


class Reached(Exception):
    """A package is about to parse its command line."""

    def __init__(self, commands: tuple[str, ...], words: list[str]) -> None:
        super().__init__()
        self.commands, self.words = commands, words


@pytest.fixture
def stop_at_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends each package where it parses its options. Keeps sys.argv and the environment."""

    def parse(config: type[Any], argv: Any = None, **rest: Any) -> NoReturn:
        raise Reached((), sys.argv[1:] if argv is None else argv)

    def parse_command(commands: Mapping[str, type[Any]], argv: Any = None, **rest: Any) -> NoReturn:
        raise Reached(tuple(commands), sys.argv[1:] if argv is None else argv)

    monkeypatch.setattr(options, "parse", parse)
    monkeypatch.setattr(options, "parse_command", parse_command)
    monkeypatch.setattr(sys, "argv", ["priorclip"])


def reached(*words: str) -> Reached:
    with pytest.raises(Reached) as found:
        main(words)
    return found.value


def test_every_package_with_commands_is_listed() -> None:
    packages = {path.parent.name for path in (ROOT / "priorclip").glob("*/__main__.py")}
    assert packages == set(COMMANDS)


@pytest.mark.parametrize("package", COMMANDS)
@pytest.mark.usefixtures("stop_at_the_parser")
def test_every_sub_command_of_a_package_is_listed_and_reached(package: str) -> None:
    own = {name for name in reached(package).commands if (package, name) not in SAME}
    assert own == set(COMMANDS[package])
    for name in COMMANDS[package]:
        assert reached(package, name, "--a", "1").words == [name, "--a", "1"]
        if name in ALONE:
            alone = reached(name, "--a", "1")
            assert alone.words == [name, "--a", "1"]
            assert own <= set(alone.commands)


@pytest.mark.usefixtures("stop_at_the_parser")
def test_the_same_command_under_a_second_name() -> None:
    for (second, name), first in SAME.items():
        assert name in COMMANDS[first]
        assert name in reached(second, name).commands


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("pak", "did you mean 'pack'?"),
        ("pretrian", "did you mean 'pretrain'?"),
        ("index", "did you mean 'data_shards index' or 'retrieval index'?"),
        ("bench", "did you mean 'data_shards bench' or 'model bench'?"),
        ("indx", "did you mean 'index'?"),
        ("xyz", "see priorclip --help"),
    ],
)
def test_an_unknown_command_ends_with_2_and_the_nearest_name(
    word: str, suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, "--help"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"priorclip: error: unknown command '{word}': {suggestion}\n")


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (["--help"], 0), (["-h"], 0), ([], 2):
        assert main(words) == code
        assert capsys.readouterr().out == usage() + "\n"
    assert {*COMMANDS, *PACKAGES} <= set(usage().split())


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "priorclip", *words]
    return subprocess.run(command, cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=120)


def test_help_loads_no_torch() -> None:
    for words in ["--help"], ["pack", "--help"]:
        program = (
            "import sys; from priorclip.__main__ import main; code = main(sys.argv[1:]); "
            "print(sorted({'torch', 'deepspeed', 'transformers', 'timm'} & sys.modules.keys())); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[]\n")


def test_python_m_priorclip_shows_the_help_of_a_sub_command() -> None:
    done = run("pack", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--shard_size" in done.stdout


def test_exit_code_and_error_of_a_sub_command_are_handed_on(tmp_path: Path) -> None:
    for words, message in (
        (
            ["pack", "--shard-sise", "5"],
            "data_shards pack: error: unknown key 'shard_sise': did you mean ",
        ),
        (["verify", str(tmp_path / "none")], "data_shards verify: error: "),
        (["pretrain", "--run.dir", "x", "--data.shards", "y", "--preset", "priorclip-b23"], "pretrain: error: "),
    ):
        done = run(*words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(message)


@pytest.mark.parametrize(("code", "returned"), [(None, 0), (0, 0), (3, 3), ("a message", 1)])
def test_the_end_of_a_package_is_the_exit_code(
    code: str | int | None, returned: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(module: str, **rest: Any) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(runpy, "run_module", end)
    monkeypatch.setattr(sys, "argv", ["priorclip"])
    assert main(["pack"]) == returned
    assert capsys.readouterr().err == ("a message\n" if code == "a message" else "")


def completions(line: str, folder: Path) -> list[str]:
    """Asks as the function does that ``register-python-argcomplete`` defines in a shell."""
    answer = folder / "answer"
    answer.write_text("")
    run(
        _ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\013", _ARGCOMPLETE_STDOUT_FILENAME=str(answer), COMP_TYPE="9",
        COMP_LINE=line, COMP_POINT=str(len(line.encode())),
    )  # fmt: skip
    return [word.strip() for word in answer.read_text().split("\013") if word]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("priorclip pret", ["pretrain"]),
        ("priorclip data_shards s", ["synthetic", "stats"]),
        ("priorclip data_shards pack --shar", ["--shards", "--shards+", "--shard_size"]),
        ("priorclip pack --shar", ["--shards", "--shards+", "--shard_size"]),
        ("/opt/priorclip prior --backbone.ima", ["--backbone.image_size"]),
        ("priorclip pretrain --run.seed 3 --run.engine.ze", ["--run.engine.zero"]),
        ("priorclip pretrain --run.engine.precision ", ["fp32", "bf16", "fp16"]),
        ("priorclip convert --input x.pt --format open", ["openai", "open_clip"]),
        ("priorclip finetune sweep --leve", ["--levels", "--levels+"]),
        ("priorclip launch --nproc 2 -- pretrain --run.engine.ze", ["--run.engine.zero"]),
        ("priorclip launch -- pret", ["pretrain"]),
        ("priorclip index --", []),
    ],
)
def test_the_tab_key_completes_commands_and_options(line: str, expected: list[str], tmp_path: Path) -> None:
    assert completions(line, tmp_path) == expected


def test_the_tab_key_lists_all_commands(tmp_path: Path) -> None:
    assert completions("priorclip ", tmp_path) == ["-h", "--help", *COMMANDS, *ALONE]
    assert completions("priorclip model ", tmp_path) == ["-h", "--help", *COMMANDS["model"]]


def test_bash_completes_with_the_line_of_the_docstring(tmp_path: Path) -> None:
    """A real bash defines the completion function, and calls it as the Tab key does."""
    (tmp_path / "priorclip").write_text(f'#!/bin/sh\nexec {sys.executable} -m priorclip "$@"\n')
    (tmp_path / "priorclip").chmod(0o755)
    script = """
        eval "$(register-python-argcomplete priorclip)"
        COMP_LINE="priorclip pack --shard_s" COMP_POINT=24 COMP_TYPE=9
        COMP_WORDS=(priorclip pack --shard_s) COMP_CWORD=2
        $(complete -p priorclip | sed 's/.*-F \\([^ ]*\\).*/\\1/') priorclip --shard_s pack
        printf '%s' "${COMPREPLY[@]}"
    """
    variables = environment()
    variables["PATH"] = f"{tmp_path}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "--shard_size", done.stderr
