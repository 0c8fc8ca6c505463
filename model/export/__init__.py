"""Export folders: writing and reading them, and other formats made from them."""
