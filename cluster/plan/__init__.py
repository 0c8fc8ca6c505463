"""`cluster plan` and `cluster simulate`: memory, time and scaling of a run before it starts."""
