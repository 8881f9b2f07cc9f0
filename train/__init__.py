"""Training: configuration, engine, loop, checkpoints, evaluation."""
