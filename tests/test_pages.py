"""Commands that stand in the pages of docs/ are run as they stand, with fewer images and epochs.

docs/cluster.md has a test of its own (tests/cluster), because its commands need hosts and SLURM.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT

PAGES = (
    "training",
    "weights",
    "python",
    "search",
    "experiments",
)  # in this order: later pages use runs of earlier ones
BLOCK = re.compile(r"^```(bash|python)\n((?:.*\n)*?)```$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
# A test runs fewer images and epochs than a reader, and its own runs stand for those of `make demo`.
SMALLER = (
    ("--count 2000", "--count 96"),
    ("--count 200 ", "--count 24 "),
    ("--first-index 2000", "--first-index 96"),
    ("runs/demo/export", "runs/tuned/export"),
    ("runs/demo/shards/test", "data/scenes-test"),
)
COMMANDS = [
    (page, language, text)
    for page in PAGES
    for language, text in BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who follows the pages from the top: a checkout, seen through links."""
    folder = tmp_path_factory.mktemp("reader")
    for path in ROOT.iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(("page", "language", "text"), COMMANDS)
def test_commands_of_a_page_run(page: str, language: str, text: str, reader: Path) -> None:
    for old, new in SMALLER:
        text = text.replace(old, new)
    text = re.sub(r"--run\.epochs \d+", "--run.epochs 1", text)
    text = text.replace("pretrain/configs/tiny.yaml", "pretrain/configs/tiny.yaml --run.epochs 1")
    words = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, cwd=reader, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_every_page_has_commands() -> None:
    assert {page for page, _, _ in COMMANDS} == set(PAGES)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_readme_leads_to_every_page() -> None:
    named = {Path(link).name for link in LINK.findall((ROOT / "README.md").read_text())}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named
