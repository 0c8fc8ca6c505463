"""Fixtures of this folder. They stand in a module of its own name, for every folder has a conftest."""

from real_trainings import basic, data, prior, stage_one

__all__ = ["basic", "data", "prior", "stage_one"]
