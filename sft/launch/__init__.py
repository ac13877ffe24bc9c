"""Where a run happens: in a process of its own, or in several."""
