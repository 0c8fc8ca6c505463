"""What a model costs: FLOPs, parameters, activation memory and measured step time."""
