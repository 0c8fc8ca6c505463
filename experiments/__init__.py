"""Experiments by name: sweeps over seeds, studies over levels, and their tables."""
