"""Fixtures of this folder. They stand in a module of its own name, for every folder has a conftest."""

from loopback_slurm import slurm
from network_hosts import network
from small_pretraining import small_pretraining
from toy_launches import toys

__all__ = ["network", "slurm", "small_pretraining", "toys"]
