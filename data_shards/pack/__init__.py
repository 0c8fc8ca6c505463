"""Packing: records become shards, with the same bytes for any number of workers."""
