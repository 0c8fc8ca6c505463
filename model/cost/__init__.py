"""The cost of a model: FLOPs, parameters, activation memory and measured step time."""
