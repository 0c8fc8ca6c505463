"""Fixtures of this folder. They stand in a module of its own name, for every folder has a conftest."""

from small_galleries import one_thread, test_set

__all__ = ["one_thread", "test_set"]
