"""Shards on other machines: addresses, range requests, and the cache on this node."""
