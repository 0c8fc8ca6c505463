"""Fixtures of this folder. They are in modules of their own, because every folder has a conftest."""

from loopback_slurm import slurm
from network_hosts import network
from small_pretraining import small_pretraining

__all__ = ["network", "slurm", "small_pretraining"]
