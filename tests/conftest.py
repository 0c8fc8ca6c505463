"""Fixtures that several test folders share. They are in modules of their own, because every folder has a conftest."""

from real_trainings import basic, data, prior, stage_one
from toy_launches import toys

__all__ = ["basic", "data", "prior", "stage_one", "toys"]
