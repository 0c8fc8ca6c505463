"""Where a model looks, against the truth of drawn scenes: the command ``retrieval belief-truth``."""
