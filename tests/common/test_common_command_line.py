"""The rule for errors and exit codes of all commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from priorclip.common.command_line import one_line, run_command

ROOT = Path(__file__).parents[2]


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("--k must be at least 1, not 0"), 2, "x y: error: --k must be at least 1, not 0\n"),
        (FileNotFoundError(2, "No such file", "a.json"), 2, "x y: error: [Errno 2] No such file: 'a.json'\n"),
        (OSError("a.json: bad\n  at line 3\x1b[31m"), 2, "x y: error: a.json: bad at line 3\\x1b[31m\n"),
        (OSError("https://host/a?token=hunter2hunter2"), 2, "x y: error: https://host/a?token=***\n"),
        (KeyboardInterrupt(), 130, "x y: error: interrupted\n"),
    ],
)
def test_error_is_one_line(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str) -> None:
    assert run_command("x y", lambda: raises(error)) == code
    assert capsys.readouterr().err == message


def test_exit_code_of_the_command_stays() -> None:
    assert run_command("x", lambda: None) == 0
    assert run_command("x", lambda: 75) == 75
    with pytest.raises(SystemExit, match="75"):
        run_command("x", lambda: sys.exit(75))


def test_unexpected_exception_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("x", lambda: 1 // 0)
    code = "import torch; torch.utils.data.DataLoader([], batch_size=-1)"
    with pytest.raises(ValueError, match="batch_size"):
        run_command("x", lambda: exec(code))


def test_one_of_several_ranks_names_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run_command("x", lambda: raises(OSError("no space"))) == 2
    assert capsys.readouterr().err.startswith(f"x: error: rank 3 of 8 on {socket.gethostname()} fails: ")


def test_one_line_prints_every_character() -> None:
    assert one_line("a\r\n b\tc \x07\u202eé\udc80") == "a b c \\x07\\u202eé\\udc80"


PROGRAM = """
import sys
from priorclip.common.command_line import run_command
sys.exit(run_command("x", lambda: print("a line\\n" * 100_000)))
"""


def test_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)


COMMANDS = [
    ("pretrain", "--nothing", "1"),
    ("finetune", "prior", "--nothing", "1"),
    ("experiments", "sweep", "no-such-family"),
    ("experiments", "resplit", "--json", "/nowhere.json", "--output", "o"),
    ("data_shards", "verify", "/nowhere"),
    ("data_shards", "pack", "--shard-size", "many"),
    ("model", "summary", "--preset", "no-such-preset"),
    ("retrieval", "evaluate", "--model", "/nowhere", "--data", "/nowhere"),
    ("cluster", "launch", "--nproc", "2"),
    ("demo", "--source", "ucmerced"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_follows_the_rule(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    name = " ".join(words[:2] if not words[1].startswith("-") else words[:1])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{name}: error: ")
    assert done.stderr.count("\n") == 1
