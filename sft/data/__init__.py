"""Rows to roles, to text, to tokens and labels, with a count of what was lost."""
