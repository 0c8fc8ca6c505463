"""The house as the code has it: which file imports which, and a picture of the rooms.

    python -m tests.house docs/rooms.svg        # draws the picture that docs/architecture.md shows

tests/test_imports.py checks the same graph: the table of packages, and that there are no circles.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Package -> the packages that it may import, and what it is for.
ALLOWED: dict[str, set[str]] = {
    "common": set(),
    "model": {"common"},
    "data_shards": {"common"},
    "training": {"common"},
    "cluster": {"common", "training"},
    "pretrain": {"common", "training", "data_shards", "model"},
    "finetune": {"common", "training", "data_shards", "model", "pretrain", "experiments"},
    "experiments": {"common", "data_shards", "model"},
    "retrieval": {"common", "data_shards", "model"},
    "demo": {"common"},
}
# From the top floor down: each package imports only those on lower floors.
FLOORS = (
    ("finetune", "demo"),
    ("pretrain", "experiments", "retrieval", "cluster"),
    ("model", "data_shards", "training"),
    ("common",),
)
LOADERS = ("import_module", "__import__", "run_module")


def modules_of(source: str) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it. A relative import gives a name that starts with
    a dot. ``from a import b`` gives both ``a`` and ``a.b``, because b can be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." if node.level else node.module or ""
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOADERS:
            names |= {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def packages_of(source: str) -> set[str]:
    """Folders at the top level that a file imports from; "" stands for a relative import."""
    names = {name.removeprefix("priorclip.").split(".")[0] for name in modules_of(source)}
    return names & {*ALLOWED, "tests", "benchmarks", ""}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def import_graph(packages: Iterable[str]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports. Names are without ``priorclip.``.

    An ``__init__.py`` has no edges, because it names the modules of its package for type checkers only and imports
    them when they are first used.
    """
    paths = [path for package in packages for path in files_of(package)]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        imported = {each.removeprefix("priorclip.") for each in modules_of(path.read_text())}
        graph[name] = set() if path.name == "__init__.py" else imported & set(names) - {name}
    return graph


def rooms_of(package: str) -> dict[str, int]:
    """Rooms of a package, the package itself first as "", and the number of Python files in each."""
    rooms: dict[str, int] = {"": 0}
    for path in files_of(package):
        inside = path.relative_to(ROOT / package).parts
        room = inside[0] if len(inside) > 1 else ""
        rooms[room] = rooms.get(room, 0) + (path.name != "__init__.py")
    return {room: count for room, count in rooms.items() if count or not room}


def imported_packages(package: str) -> list[str]:
    """Packages of ours that the files of a package import."""
    return sorted({name for path in files_of(package) for name in packages_of(path.read_text())} - {package, ""})


def draw() -> str:
    """The picture as SVG: a box for each package with its rooms, the number of files in each, and what it imports.

    A package imports only packages on lower floors.
    """
    width, row, gap = 1000, 22, 24
    parts: list[str] = []
    y = gap
    for floor in FLOORS:
        box = (width - gap * (len(floor) + 1)) / len(floor)
        rooms = {package: rooms_of(package) for package in floor}
        columns = max(1, int(box // 150))
        height = 54 + row * max(-(-(len(each) - 1) // columns) for each in rooms.values())
        for place, package in enumerate(floor):
            x = gap + place * (box + gap)
            parts.append(f'<rect x="{x:.0f}" y="{y}" width="{box:.0f}" height="{height}" class="package"/>')
            files = rooms[package].pop("")
            parts.append(f'<text x="{x + 10:.0f}" y="{y + 21}" class="name">{package}/ <tspan class="count">{files}')
            imports = f"← {', '.join(imported_packages(package)) or 'nothing'}"
            parts.append(f'</tspan></text><text x="{x + 10:.0f}" y="{y + 40}" class="imports">{imports}</text>')
            for number, (room, count) in enumerate(sorted(rooms[package].items())):
                left = x + 10 + (number % columns) * (box - 20) / columns
                top = y + 64 + row * (number // columns)
                parts.append(f'<text x="{left:.0f}" y="{top}">{room}/ <tspan class="count">{count}</tspan></text>')
        y += height + gap
    style = (
        "text{font:13px sans-serif;fill:#1b1b1b}.name{font-weight:bold;font-size:14px}"
        ".imports{fill:#555;font-size:10.5px}.count{fill:#777;font-weight:normal}"
        ".package{fill:#f4f6f8;stroke:#8aa0b4;rx:6}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}">'
    background = f'<rect width="{width}" height="{y}" fill="white"/>'
    return "\n".join([head, f"<style>{style}</style>", background, *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw())
