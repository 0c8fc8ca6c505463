"""Two tests at a time (pytest-xdist, ``-n 2``), where what is dear to make is still made once.

A session fixture lives in one worker process, so files whose tests share one run in the same worker, one after another;
other files go to whichever worker is free. Files that start ranks and services take longest and come first, so that
no worker ends long after the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

CHEAP = {"packed", "tokenizer_folder", "one_thread", "tmp_path_factory"}
LONG_FIRST = ("tests/cluster", "tests/training", "tests/demo")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): tests of one worker")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leader: dict[str, str] = {}  # of a file or fixture: its group's first file
    for item in items:
        file = file_of(item)
        members = [file, *(f"fixture {name}" for name in dear_fixtures(item))]
        groups = {leader[name] for name in members if name in leader} or {file}
        first = min(groups)
        for name in [*members, *(name for name, group in leader.items() if group in groups)]:
            leader[name] = first
    items.sort(key=lambda item: not file_of(item).startswith(LONG_FIRST))  # stable
    for item in items:
        item.add_marker(pytest.mark.xdist_group(leader[file_of(item)]))


def file_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def dear_fixtures(item: pytest.Item) -> Iterable[str]:
    """Names of the session fixtures that the test takes, directly or not."""
    found = getattr(item, "_fixtureinfo", None)
    for name, definitions in found.name2fixturedefs.items() if found else ():
        if definitions[-1].scope == "session" and name not in CHEAP and definitions[-1].baseid:
            yield name
