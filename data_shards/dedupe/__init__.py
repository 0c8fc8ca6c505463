"""Duplicate images: within a pack, and between training and evaluation data."""
