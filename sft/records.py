"""Read what a run folder holds, whatever state it is in: missing files, torn lines and odd values are no errors here."""

import json
import math
import re
from pathlib import Path
from typing import Any

from sft.forms import FORMS, fit, fitted, tell

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
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else []
    odd: list[str] = []
    events = [fit(event, FORMS.get(path.name, {}), odd, f"line {number}") for number, event in enumerate(map(parse, lines), 1)]
    if odd:
        tell(path, odd)
    return [event for event in events if event]


def merge_steps(events: list[dict]) -> list[dict]:
    """Merge the log events of each step into one row, in step order; a resumed run's later values win."""
    rows: dict[float, dict] = {}
    for event in events:
        if (step := number(event.get("step"))) is not None:
            rows.setdefault(step, {}).update({key: number(value) for key, value in event.items()})
    return [rows[step] for step in sorted(rows)]


def summarise(run: dict, rows: list[dict]) -> dict:
    """Return run.json's metrics, with what a run that died early did not write there taken from its curves."""
    metrics = {}
    for key, field, choose in [
        ("loss", "loss", lambda v: v[-1]),
        ("eval_loss", "eval_loss", lambda v: v[-1]),
        ("eval_loss_start", "eval_loss", lambda v: v[0]),
        ("eos_share", "eos_share", lambda v: v[-1]),
        ("eos_share_start", "eos_share", lambda v: v[0]),
        ("memory_gib", "memory_gib", max),
        ("tokens", "tokens", max),
        ("steps", "step", max),
        ("epochs", "epoch", max),
    ]:
        values = [row[field] for row in rows if row.get(field) is not None]
        metrics |= {key: choose(values)} if values else {}
    metrics |= {key: value for key, value in run.get("metrics", {}).items() if value is not None}
    if metrics.get("eval_loss_start") and "eval_loss" in metrics:
        metrics["change"] = metrics["eval_loss"] / metrics["eval_loss_start"] - 1
    return metrics
