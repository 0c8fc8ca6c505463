"""`cluster check`: probes each host and names what would stop a run there."""
