"""The site of `make docs`: it builds without a warning, is complete, its links lead somewhere, it asks nobody."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from house import ROOT
from PIL import Image

from demo.config import DemoConfig
from priorclip.__main__ import COMMANDS
from priorclip.pretrain.commands import PretrainConfig
from tests.site_page import build, take_pictures

PUBLIC = ("model", "data_shards", "retrieval")
TABLE = re.compile(r"^\|[ :|-]+\|$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


class Page(HTMLParser):
    """What a page has: ids, the targets of its links, what a browser fetches with it, tables, and text by id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.tables = 0
        self.said: dict[str, str] = {}
        self.last = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attrs}
        self.tables += tag == "table"
        if "id" in of:
            self.ids.add(of["id"])
            self.last = self.last if of["id"].startswith("__") else of["id"]  # lines of code have ids too
        if "href" in of:
            (self.links if tag == "a" else self.fetched).append(of["href"])
        if "src" in of:
            self.fetched.append(of["src"])

    def handle_data(self, data: str) -> None:
        self.said[self.last] = f"{self.said.get(self.last, '')} {data}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in site.rglob("*.html")}


def leaves(nav: Any) -> Iterator[str]:
    """Paths in a navigation, which has lists, names and paths."""
    if isinstance(nav, str):
        yield nav
    for each in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from leaves(each)


def test_every_page_is_in_the_navigation(pages: dict[str, Page]) -> None:
    nav = {*leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])}
    docs = {path.with_suffix(".md").name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")}
    assert docs - nav == set()
    assert {path.replace(".md", ".html") for path in nav} == pages.keys() - {"404.html"}


def options(config: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of a dataclass and of the dataclasses in it."""
    types = get_type_hints(config)
    for item in fields(config):
        if is_dataclass(types[item.name]):
            yield from options(types[item.name], f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{item.name}"


def sections() -> Iterator[tuple[str, str, type[Any]]]:
    """Package, sub-command and dataclass of every command."""
    yield "pretrain", "", PretrainConfig
    yield "demo", "", DemoConfig
    for package, names in COMMANDS.items():
        for name in names:
            yield package, name, import_module(f"priorclip.{package}.__main__").COMMANDS[name]


@pytest.mark.parametrize(("package", "name", "config"), sections())
def test_every_option_is_in_the_reference(pages: dict[str, Page], package: str, name: str, config: type[Any]) -> None:
    page = pages[f"reference/commands/{package}.html"]
    section = f"{package}-{name}" if name else f"python-m-{package}"
    assert section in page.ids
    words = page.said[section].split()
    missing = [option for option in options(config) if f"--{option}" not in words]
    assert not missing


def docstring(name: str) -> str:
    """The docstring of ``priorclip.PACKAGE.MODULE.NAME``, read from its source: an import would bring torch."""
    module, _, own = name.rpartition(".")
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == own:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and own in {alias.name for alias in node.names}:
            return docstring(f"{node.module}.{own}")
    raise AssertionError(f"{path} has no {own}")


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_its_docstring(pages: dict[str, Page], package: str) -> None:
    page, module = pages[f"reference/python/{package}.html"], import_module(f"priorclip.{package}")
    places = {id.rpartition(".")[2]: id for id in page.ids if id.count(".") >= 2}
    assert set(module.__all__) <= places.keys()
    for name in module.__all__:
        first = docstring(places[name]).split("\n")[0]
        assert first, name
        said = "".join(each for id, each in page.said.items() if id.startswith(places[name]))
        plain = re.sub(r"\W+", " ", first.replace("``", "")).strip()
        assert plain in re.sub(r"\W+", " ", said), name


def test_every_link_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    wrong = []
    for name, page in pages.items():
        for link in (*page.links, *page.fetched):
            target = urlsplit(link)
            if target.scheme or link.startswith(("/", "#__")) or name == "404.html":
                continue
            path = (site / name).parent / unquote(target.path) if target.path else site / name
            there = os.path.relpath(path.resolve(), site)
            if not path.is_file():
                wrong.append(f"{name}: {link}")
            elif target.fragment and there in pages and unquote(target.fragment) not in pages[there].ids:
                wrong.append(f"{name}: {link} has no such heading")
    assert not wrong


def test_a_file_of_the_repository_is_on_the_site(site: Path, pages: dict[str, Page]) -> None:
    assert "files/cluster/slurm/run.sbatch" in pages["cluster.html"].links
    assert (site / "files/cluster/slurm/run.sbatch").read_text() == (ROOT / "cluster/slurm/run.sbatch").read_text()


def test_reading_the_site_asks_no_other_server(pages: dict[str, Page]) -> None:
    asked = {link for page in pages.values() for link in page.fetched if urlsplit(link).scheme not in ("", "data")}
    assert not asked


def test_the_first_page_in_a_browser(site: Path, tmp_path: Path) -> None:
    """In light and in dark colours, without errors and without a request to another server. CONTRIBUTING shows both."""
    pictures = tmp_path / "first-page.png", tmp_path / "first-page-dark.png"
    asked = take_pictures(site, pictures)
    assert {urlsplit(address).hostname for address in asked if not address.startswith("data:")} == {"127.0.0.1"}
    for taken in pictures:
        new, stored = (Image.open(path).convert("L") for path in (taken, ROOT / "docs" / taken.name))
        assert new.size == stored.size
        for picture in (new, stored):
            share = sum(picture.histogram()[128:]) / (picture.width * picture.height)
            assert share < 0.2 if "dark" in taken.name else share > 0.7
            low, high = picture.getextrema()
            assert high - low > 150  # there is text


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_tables_and_lists_are_what_they_are_on_github(site: Path, pages: dict[str, Page], path: Path) -> None:
    """GitHub needs no empty line before a list or a table, mkdocs does."""
    text = FENCE.sub("", path.read_text())
    assert pages[f"{path.stem}.html"].tables == len(TABLE.findall(text))
    paragraphs = re.findall(r"<p>.*?</p>", (site / f"{path.stem}.html").read_text(), re.DOTALL)
    assert not [each for each in paragraphs if re.search(r"\n([*-]|\d+\.) |```", each)]
