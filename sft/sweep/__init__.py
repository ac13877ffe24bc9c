"""Many runs as one thing: found again, continued, isolated and ranked. Imports nothing heavy."""

from collections.abc import Callable

exit_codes: list[int] = []
"""Exit code of each job of this command; the command ends with the highest."""

summaries: list[Callable[[], None]] = []
"""What this command has to say when all its jobs are over."""


def summarise() -> None:
    """Say it, once, at the end of the command."""
    while summaries:
        summaries.pop()()
