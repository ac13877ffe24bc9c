"""Many runs as one thing: found again, continued, isolated and ranked. Imports nothing heavy."""

exit_codes: list[int] = []
"""Exit code of each job of this command; the command ends with the highest."""
