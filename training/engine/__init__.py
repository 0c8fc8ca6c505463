"""The DeepSpeed engine: settings, offload, gradient caching, gradient norms and moving averages."""
