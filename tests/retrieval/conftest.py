"""Fixtures of this folder. They are in a module with a unique name, because every folder has a conftest."""

from small_galleries import one_thread, test_set

__all__ = ["one_thread", "test_set"]
