"""Which sample stands at which position of an epoch."""
