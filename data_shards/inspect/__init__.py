"""Looking at shards: verify, sizes, statistics and speed."""
