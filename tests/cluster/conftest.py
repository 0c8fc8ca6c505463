"""Fixtures of this folder. They stand in a module of its own name, for every folder has a conftest."""

from loopback_slurm import slurm
from toy_launches import toys

__all__ = ["slurm", "toys"]
