"""Read what a run folder holds, whatever state it is in: missing files, torn lines and odd values are no errors here."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from sft.storage.atomic import drop_link, write_text
from sft.storage.forms import FORMS, fit, fitted, warn

HALF = re.compile(r"\\u[dD][89a-fA-F]")


def number(value: Any) -> float | int | None:
    """Return value if it is a finite number, else None."""
    try:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return None
    return value if good else None


def parse_object(text: str) -> dict | None:
    """Parse a JSON object; None for what is not one, and numbers that are not finite become None.

    Half a character, which no file and no terminal takes, becomes `?`.
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_parse_float, parse_int=_parse_int)
        if HALF.search(text):
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse(text: str) -> dict:
    """Parse a JSON object; what is not one becomes {}, and numbers that are not finite become None."""
    return parse_object(text) or {}


def _parse_float(digits: str) -> float | None:
    return number(float(digits))


def _parse_int(digits: str) -> int | None:
    return number(int(digits)) if len(digits) < 400 else None


def read_json(path: Path) -> dict:
    """Read a JSON file without its null entries; a missing or broken file reads as {}.

    Entries of an odd form are left out, with a warning.
    """
    found = fitted(parse(path.read_text("utf-8", errors="replace")), path) if path.is_file() else {}
    return {key: value for key, value in found.items() if value is not None}


def read_lines(path: Path) -> list[dict]:
    """Read a JSON-lines file, leaving out lines that do not parse: a killed run tears its last one."""
    return [*each_line(path)]


def each_line(path: Path) -> Iterator[dict]:
    """The same, a line at a time: the file may be larger than the memory."""
    if not path.is_file():
        return
    odd: list[str] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if event := fit(parse(text), FORMS.get(path.name, {}), odd, f"line {number}"):
                yield event
    if odd:
        warn(path, odd)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is the old one or the whole new one, also after a power cut."""
    write_text(path, json.dumps(jsonable(content), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def append_jsonl(path: Path, entry: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file."""
    drop_link(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(jsonable(entry), ensure_ascii=False, allow_nan=False) + "\n")


def jsonable(value: Any) -> Any:
    """Plain JSON values: enums by their value, paths as text, numbers that JSON lacks as null."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [jsonable(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def now() -> str:
    """The time now, UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
