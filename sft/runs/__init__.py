"""The run folder: its record, and how a run is resumed."""
