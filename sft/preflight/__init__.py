"""What can be known before a run, and how it is shown."""
