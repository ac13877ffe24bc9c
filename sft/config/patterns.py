"""Regular expressions that a user types: the filters of rows, the adapted layers, a reward."""

import re
import warnings


def compile_pattern(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """The pattern, compiled by Python's `re`.

    `re` warns of brackets in brackets, which may come to mean more one day. They mean what they meant, so nothing is shown.

    Raises:
        re.error: it is no regular expression, or one beyond what `re` can hold.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return re.compile(pattern, flags)
    except (OverflowError, RecursionError) as error:
        raise re.error(str(error) or type(error).__name__) from None


def pattern_fault(pattern: str) -> str:
    """Why a pattern cannot be used, as a refusal says it; empty if it can."""
    try:
        compile_pattern(pattern)
    except re.error as error:
        return f"Not a regular expression: {error}."
    return ""
