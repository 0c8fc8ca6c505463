"""Two tests at a time (pytest-xdist, ``-n 2``), where what is dear to make is still made once.

A session fixture lives in one worker process, so a folder that shares ranks and services runs in one worker,
in order; of the other folders each file goes to whichever worker is free. Long ones come first.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/cluster", "tests/training", "tests/retrieval")


class SharedFixtures(LoadScopeScheduling):
    """Deals out folders of ``TOGETHER``, and single files of the others."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return next((folder for folder in TOGETHER if file.startswith(folder)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> SharedFixtures:
    return SharedFixtures(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(TOGETHER))  # stable
