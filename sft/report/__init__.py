"""The page of one run. Reads run folders, nothing else."""
