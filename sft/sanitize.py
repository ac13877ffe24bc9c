"""Text that is safe to print and to log, whatever stood in rows, file names and addresses. Imports nothing heavy."""

import re
import unicodedata

TURNING = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Unicode's marks of direction, and its line and paragraph ends."""


def shown(text: str) -> str:
    """Text for a terminal: control characters, which could move the cursor or change a title, are shown and not sent.

    So are the marks that turn the direction of a line around. Wide spaces and joiners, as Chinese and emoji have them, stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(c)[1:-1] if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in TURNING else c for c in text
    )


def without_passwords(text: str) -> str:
    """Text in which no address holds a user name and a password, as HF_ENDPOINT and proxies may have them."""
    return re.sub(r"(\w://)[^/@\s'\"]+@", r"\1...@", text)
