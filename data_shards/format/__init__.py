"""The files of a shard folder: tar, index, manifest and samples."""
