"""Pictures of what a model does with a test set: t-SNE, best answers, belief maps, and recall by scene."""
