"""Which package may import which (docs/architecture.md), and that help does not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys

import networkx
import pytest
from house import ALLOWED, FLOORS, ROOT, draw, files_of, import_graph, modules_of, packages_of

PACKAGES = [name for name in ALLOWED if name != "demo"]
HEAVY = ("torch", "deepspeed", "transformers", "timm", "torchvision", "matplotlib", "scipy", "pandas")
COMMANDS = ("data_shards", "pretrain", "finetune", "cluster", "retrieval", "model", "cluster launch", "cluster sbatch",
            "cluster check", "finetune closed")  # fmt: skip


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package: str) -> None:
    files = files_of(package)
    assert files, f"{package}/ has no code"
    found = {
        f"{path.relative_to(ROOT)} imports {name or 'by a relative name'}"
        for path in files
        for name in packages_of(path.read_text()) - ALLOWED[package] - {package}
    }
    assert not found


def test_every_package_is_in_the_table() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "priorclip"} <= set(ALLOWED)


def test_all_packages_are_in_the_namespace() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "priorclip").iterdir() if path.is_symlink()}
    assert links == {name: ROOT / name for name in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_have_one_name(package: str) -> None:
    """Imported as ``model.recall`` too, a module would exist twice: its classes and state would differ."""
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [
            *(ROOT / package).rglob("*.py"),
            *(ROOT / "tests").rglob("test_*.py"),
            *(ROOT / "benchmarks").rglob("*.py"),
        ]
        for name in modules_of(path.read_text())
        if name.split(".")[0] == package
    }
    assert not wrong


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, by Tarjan's algorithm as networkx has it."""
    whole = networkx.DiGraph([(a, b) for a, targets in edges.items() for b in targets])
    return sorted(sorted(group) for group in networkx.strongly_connected_components(whole) if len(group) > 1)


def test_no_circles_between_files() -> None:
    assert circles(import_graph(PACKAGES)) == []


def test_no_circles_between_packages() -> None:
    assert circles({package: targets - {package} for package, targets in ALLOWED.items()}) == []


def test_a_floor_imports_only_from_floors_below() -> None:
    floor_of = {package: number for number, floor in enumerate(FLOORS) for package in floor}
    assert floor_of.keys() == ALLOWED.keys()
    assert all(floor_of[package] < floor_of[target] for package in ALLOWED for target in ALLOWED[package])


def test_rooms_are_not_crowded() -> None:
    """A newcomer reads a folder at once if it has few files."""
    crowded = {
        str(folder.relative_to(ROOT)): len(files)
        for package in ALLOWED
        for folder in {path.parent for path in files_of(package)}
        if len(files := list(folder.glob("*.py"))) > 27
    }
    assert not crowded


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    assert (ROOT / "docs" / "rooms.svg").read_text() == draw(), "run: python -m tests.house docs/rooms.svg"


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_hidden_imports_are_seen() -> None:
    source = "def f():\n    from priorclip.pretrain.commands import x\n    importlib.import_module('finetune.prior')\n"
    assert packages_of(source) == {"pretrain", "finetune"}
    assert packages_of("from . import x\nfrom .y import z\n") == {""}


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
