"""A page for each package with public names; mkdocstrings fills in signatures and docstrings.

from priorclip.model import build_model    ->    ::: priorclip.model.build.build_model
"""

from __future__ import annotations

import importlib

PACKAGES = ("model", "data_shards", "retrieval")


def python_pages() -> dict[str, str]:
    """Path of each page -> its Markdown."""
    return {f"reference/python/{package}.md": page(package) for package in PACKAGES}


def page(package: str) -> str:
    """The Markdown of a package's page: each public name, from the module that defines it."""
    names = public_names(package)
    example = next(iter(names))
    lines = [f"# priorclip.{package}", "", f"All of these are imported as `from priorclip.{package} import {example}`."]
    return "\n\n".join([*lines, *(f"::: {target}" for target in names.values()), ""])


def public_names(package: str) -> dict[str, str]:
    """Public name -> full name of what it stands for. Nothing heavy is imported."""
    module = importlib.import_module(f"priorclip.{package}")
    places = getattr(module, "EXPORTS", None) or module.MODULE_OF
    return {name: f"priorclip.{package}.{places[name]}.{name}" for name in module.__all__}
