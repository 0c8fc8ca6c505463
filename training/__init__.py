"""What all trainings share: configuration, the run and its loop, ranks, engine, checkpoints, monitoring."""
