"""Training: step, optimizer, loop, checkpoints, metrics."""
