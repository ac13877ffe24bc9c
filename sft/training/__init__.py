"""One step and what surrounds it: metrics, checkpoints, OOM retry, non-finite steps, the time budget."""
