"""Checkpoints: their files, writing them while the run goes on, and loading them on other ranks."""
