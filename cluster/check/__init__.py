"""`cluster check`: what each host has, and what would stop a run there."""
