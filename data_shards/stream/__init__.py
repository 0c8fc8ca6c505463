"""Batches for training and evaluation, and the worker processes that make them."""
