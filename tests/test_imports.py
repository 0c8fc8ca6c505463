"""Which package may import which (docs/architecture.md), and that help does not wait for torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {"model", "data_shards", "cluster"}
ALLOWED: dict[str, set[str]] = {
    "model": set(),
    "data_shards": set(),
    "cluster": set(),
    "pretrain": TOOLS,
    "finetune": TOOLS,
    "retrieval": {"model", "data_shards"},
    "demo": set(),
}
HEAVY = ("torch", "deepspeed", "transformers", "timm", "torchvision", "matplotlib", "scipy", "pandas")
COMMANDS = ("data_shards", "pretrain", "finetune", "cluster", "retrieval", "model", "cluster launch", "cluster sbatch",
            "cluster check", "finetune closed")  # fmt: skip


def imported(source: str, package: str) -> set[str]:
    """Top-level names that a file of ``package`` imports, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS:
            names |= {str(arg.value).split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


LOADERS = ("import_module", "__import__", "run_module")


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ has no code"
    forbidden = (set(ALLOWED) | {"tests"}) - ALLOWED[package] - {package}
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path.read_text(), package) & forbidden
    }
    assert not found


def test_options_imports_none_of_ours() -> None:
    assert not imported((ROOT / "options.py").read_text(), "options") & set(ALLOWED)


def test_every_package_is_in_the_table() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} <= set(ALLOWED)


def test_hidden_imports_are_seen() -> None:
    source = "def f():\n    from pretrain.train import pretrain\n    importlib.import_module('finetune.prior')\n"
    assert imported(source, "model") == {"pretrain", "finetune"}
    assert imported("from . import x\nfrom .y import z\n", "model") == {"model"}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python says on stderr, at its end, which heavy packages it has imported."""
    folder = tmp_path_factory.mktemp("site")
    show = f"print('heavy:', *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    (folder / "sitecustomize.py").write_text(f"import atexit, sys\natexit.register(lambda: {show})\n")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_waits_for_no_heavy_package(command: str, watched: dict[str, str]) -> None:
    """Which is what makes it answer at once: each of them takes seconds to import, and the rest tenths."""
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--help"], cwd=ROOT, env=watched, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stderr.splitlines()[-1].strip() == "heavy:"


def test_the_watch_sees_a_heavy_package(watched: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import scipy"], env=watched, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1].strip() == "heavy: scipy"
