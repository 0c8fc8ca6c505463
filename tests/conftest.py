"""Fixtures that several test folders share. They have their own modules, because tests import functions from them."""

from real_trainings import basic, data, drawn, prior, stage_one
from toy_launches import toys

__all__ = ["basic", "data", "drawn", "prior", "stage_one", "toys"]
