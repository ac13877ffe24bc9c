"""What is decided before a run: memory, micro-batch, schedule."""
