"""What every training run shares: configuration, ranks, engine, checkpoints, monitoring and the loop."""
