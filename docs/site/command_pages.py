"""A page for each package of commands: what ``--help`` says, read from the parsers that the commands use.

## retrieval search
python -m retrieval search [options]    or    priorclip search [options]
--k    int    default 5    number of hits
"""

from __future__ import annotations

import argparse
import html
import json
import re
import runpy
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, capture_parser

from priorclip.__main__ import ALONE, COMMANDS

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"``([^`]+)``|`([^`]+)`")
OWN = ("help", "print_config", "print_shtab")


def command_pages() -> dict[str, str]:
    """Path of each page -> its Markdown."""
    return {f"reference/commands/{name}.md": page(name) for name in (*COMMANDS, "demo")}


def page(package: str) -> str:
    """The Markdown of a package's page, a section for each sub-command."""
    parser = parser_of(package)
    children = sub_commands(parser)
    lines = [f"# python -m {package}", "", text(parser.description), ""]
    if not children:
        lines += [usage(package, ""), "", *tables(parser)]
    for name, child in children.items():
        lines += [f"## {package} {name}", "", text(child.description), "", usage(package, name), "", *tables(child)]
    return "\n".join(lines) + "\n"


def parser_of(package: str) -> ArgumentParser:
    """The parser that the command uses, with its defaults; the command does not run."""
    module = package if package == "demo" else f"priorclip.{package}"
    words, sys.argv = sys.argv, [package]
    if str(ROOT) not in sys.path:  # the demo is no part of an installed package
        sys.path.append(str(ROOT))
    try:
        return capture_parser(lambda: runpy.run_module(module, run_name="__main__"))
    finally:
        sys.argv = words


def sub_commands(parser: ArgumentParser) -> Mapping[str, ArgumentParser]:
    """Name -> parser of the sub-commands; none if the package is a command itself."""
    return next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})


def usage(package: str, name: str) -> str:
    words = f"{package} {name}".strip()
    lines = [f"python -m {words} [options]"]
    if package in COMMANDS:
        lines.append(f"priorclip {name if ALONE.get(name) == package else words} [options]")
    return "\n".join(["```", *lines, "```"])


def tables(parser: ArgumentParser) -> list[str]:
    """HTML tables of the options, one for each group that has some."""
    lines: list[str] = []
    for group in parser._action_groups:
        rows = [row(parser, action) for action in group._group_actions if shown(action)]
        if rows:
            said = group.title in ("options", "positional arguments") or str(parser.description).startswith(group.title)
            lines += ["" if said else f"<h4>{text(group.title)}</h4>", "<table><thead><tr>"]
            lines += ["<th>option</th><th>value</th><th>default</th><th></th></tr></thead><tbody>"]
            lines += [*rows, "</tbody></table>", ""]
    return lines


def shown(action: argparse.Action) -> bool:
    return action.dest not in OWN and action.help != argparse.SUPPRESS and not isinstance(action.choices, dict)


def row(parser: ArgumentParser, action: argparse.Action) -> str:
    name = next((option for option in action.option_strings if option.startswith("--")), action.dest)
    kind = kind_text(getattr(action, "_typehint", None) or action.type or str)
    default = getattr(action, "default", None)
    given = "required" if action.required else default_text(default)
    what = text(action.help % {"default": default} if "%(default" in (action.help or "") else action.help)
    cells = (f"<code>{name}</code>", html.escape(kind), given, what)
    return f'<tr><td style="white-space: nowrap">{"</td><td>".join(cells)}</td></tr>'


def default_text(value: Any) -> str:
    if value is None or value == argparse.SUPPRESS:
        return ""
    try:
        shown = value if isinstance(value, str) else json.dumps(value)
    except TypeError:
        shown = str(value)
    return f"<code>{html.escape(shown)}</code>"


def kind_text(kind: Any) -> str:
    """A type in words: ``a or b``, ``list of int``, ``float or null``."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(str(value) for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_text(each) for each in inside)
    if origin in (list, tuple):
        return f"list of {kind_text(inside[0])}" if inside else "list"
    if kind is type(None):
        return "null"
    return {"str": "text"}.get(name := getattr(kind, "__name__", ""), name or "YAML file")


def text(words: str | None) -> str:
    """Help text as HTML: nothing in it is markup but the names between backquotes."""
    return CODE.sub(lambda found: f"<code>{found[1] or found[2]}</code>", html.escape(words or "", quote=False))
