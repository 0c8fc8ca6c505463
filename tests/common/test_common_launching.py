"""Command lines of launches on this machine, and subprocesses whose output goes to a log."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from priorclip.common.command_names import PACKAGES, module_of
from priorclip.common.launching import display_command, launch_command, run_logged


def test_commands_are_modules_of_the_namespace() -> None:
    """So that launches also work where the package is installed and no folder ``pretrain`` exists."""
    assert module_of("pretrain") == "priorclip.pretrain"
    assert module_of("tests.cluster.toy_run") == "tests.cluster.toy_run"
    assert module_of("priorclip.pretrain") == "priorclip.pretrain"
    for package in PACKAGES:
        assert importlib.util.find_spec(f"{module_of(package)}.__main__"), package


def test_one_process_is_plain_python() -> None:
    command = launch_command("priorclip.pretrain", ["--config", "my run.yaml"])
    assert command == [sys.executable, "-m", "priorclip.pretrain", "--config", "my run.yaml"]
    assert display_command(command).endswith(" -m priorclip.pretrain --config 'my run.yaml'")
    assert "/" not in display_command(command).split()[0]


def test_ranks_use_the_deepspeed_launcher_of_this_environment() -> None:
    command = launch_command("priorclip.pretrain", ["--run.epochs", "2"], ranks=3)
    assert command[0] == str(Path(sys.executable).with_name("deepspeed"))
    assert command[1:5] == ["--hostfile", "/dev/null", "--num_gpus", "3"]
    assert 1024 < int(command[command.index("--master_port") + 1]) < 65536
    assert command[command.index("--module") + 1 :] == ["priorclip.pretrain", "--run.epochs", "2"]


def test_output_goes_to_the_log_and_line_by_line_to_the_caller(tmp_path: Path) -> None:
    program = "import sys; print('a\\rb'); print('c', end='', file=sys.stderr); sys.exit(3)"
    for on_line in (None, (lines := []).append):
        with (tmp_path / "log").open("ab") as log:
            assert run_logged([sys.executable, "-u", "-c", program], log, on_line=on_line) == 3
    assert (tmp_path / "log").read_bytes() == b"a\rb\nc" * 2
    assert lines == ["a", "b", "c"]
