"""Pictures of a model's results: belief maps, mistakes and similarities."""
