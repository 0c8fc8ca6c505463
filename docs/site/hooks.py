"""What mkdocs does beside its own work: pages from files outside docs/, pages from the code, links as GitHub has them.

    README.md                                  -> index.md, and its table of tasks -> tasks.md
    CONTRIBUTING.md                            -> contributing.md
    docs/tutorial.ipynb                        -> tutorial.md                        (notebook_pages.py)
    parsers of the commands                    -> reference/commands/PACKAGE.md      (command_pages.py)
    public names of the packages               -> reference/python/PACKAGE.md        (python_pages.py)
    a link to another file of the repository   -> files/PATH, a copy of that file

The pages are written for GitHub, where a link is relative to its file. Here each link is turned to the page that stands
for its target, so the same text works in both places.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from command_pages import command_pages
from mkdocs.structure.files import File, Files
from notebook_pages import notebook_page
from python_pages import python_pages

ROOT = Path(__file__).resolve().parents[2]
TASKS = re.compile(r"^## I want to \.\.\.\n(.*?)(?=^## )", re.MULTILINE | re.DOTALL)
MORE = "**[What do you want to do?](tasks.md)** lists the tasks with the command and the page of each.\n\n"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TITLED = re.compile(r"^```(\w+) (\w[^\n=]*)$", re.MULTILINE)
LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)#\s]+)")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "docs/tutorial.ipynb": "tutorial.md"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that stand outside of docs/ or are made from the code."""
    readme = (ROOT / "README.md").read_text()
    tasks = TASKS.search(readme)
    if tasks is None:
        raise ValueError("README.md has no section '## I want to ...', which becomes the page of tasks")
    tutorial, pictures = notebook_page(ROOT / "docs" / "tutorial.ipynb")
    texts = {
        "index.md": turn_links(TASKS.sub("", readme), "", files, config),
        "tasks.md": turn_links(f"# What do you want to do?\n\n{tasks[1]}", "", files, config),
        "contributing.md": turn_links((ROOT / "CONTRIBUTING.md").read_text(), "", files, config),
        "tutorial.md": turn_links(tutorial, "docs", files, config),
        **command_pages(),
        **python_pages(),
    }
    for path, content in {**texts, **pictures}.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns the links of a page of docs/ into links of the site."""
    markdown = TITLED.sub(r'```\1 title="\2"', markdown)
    return markdown if page.file.generated_by else turn_links(markdown, "docs", files, config)


def turn_links(text: str, folder: str, files: Files, config: Any) -> str:
    """Returns the text with links of the site in place of paths from the folder of the repository that has the text."""

    def turn(found: re.Match[str]) -> str:
        return found[1] + site_path(os.path.normpath(os.path.join(folder, found[2])), files, config)

    parts, place = [], 0
    for fence in FENCE.finditer(text):  # code is no link
        parts += [LINK.sub(turn, text[place : fence.start()]), fence[0]]
        place = fence.end()
    return "".join([*parts, LINK.sub(turn, text[place:])])


def site_path(path: str, files: Files, config: Any) -> str:
    """Returns the page or file of the site for a path of the repository. A file outside docs/ is copied to files/."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    copy = f"files/{path}"
    if (ROOT / path).is_file() and files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return copy  # mkdocs warns if there is no such file
