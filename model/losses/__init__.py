"""Losses over the global batch, and what they gather from other ranks."""
