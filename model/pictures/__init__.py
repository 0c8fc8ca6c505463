"""Pictures of a model's results: belief maps, errors and similarities."""
