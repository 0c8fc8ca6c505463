"""Image and text encoders, their pretrained weights, and low-rank adapters."""
