"""Losses over the global batch, and the communication between ranks that they need."""
