"""``make demo``: the whole system on one machine, every step the same command that a user would type."""
