"""Fixtures of this folder. They are in modules with unique names, because every folder has a conftest."""

from placed_index import placed_index, placed_searcher
from small_galleries import one_thread, test_set

__all__ = ["one_thread", "placed_index", "placed_searcher", "test_set"]
