"""Values as a report shows them. A filter gives None for what was not recorded, and the template says so."""

import datetime
import itertools
import json
import re
from typing import Any

from markupsafe import Markup, escape

from sft.storage.jsonio import number

MAX_TOKENS = 3000  # tokens shown of one training example

SPECIAL = re.compile(  # special tokens as the common chat templates write them
    r"(<[|｜][^|｜<>\s]{1,60}[|｜]>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|end_of_text)>"
    r"|</?think>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>)"
)


FILTERS = ("fixed", "short", "duration", "moment", "setting", "specials")
"""The functions here that templates call."""


def fixed(value: Any, pattern: str = ",.0f", unit: str = "") -> str | None:
    """Format a number with a format pattern and a unit."""
    return None if number(value) is None else format(value, pattern).replace("-", "−") + unit


def short(value: Any) -> str | None:
    """Format a count in full below a million and in millions or billions above."""
    if number(value) is None or value < 1e6:
        return fixed(value)
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"


def duration(seconds: Any) -> str | None:
    """Format seconds as 8.4 s, 3 min 20 s or 2 h 5 min."""
    if number(seconds) is None or seconds < 60:
        return fixed(seconds, ".1f", " s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def moment(text: Any) -> str | None:
    """Format an ISO time for reading; anything else stays as it is."""
    try:
        return datetime.datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except (TypeError, ValueError):
        return text


def setting(value: Any) -> str:
    """Write a setting's value as it would stand in a config file, and a small number as 5e-5."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return re.sub(r"(?<=\d)e([+-])0+(?=\d)", r"e\1", text) if isinstance(value, float) else text


def specials(text: Any) -> Markup:
    """Escape text and show its special tokens as chips."""
    pieces = enumerate(SPECIAL.split("" if text is None else str(text)))  # odd pieces are the special tokens
    return Markup("").join(Markup('<span class="chip">{}</span>').format(p) if i % 2 else escape(p) for i, p in pieces)


def mark_tokens(example: dict) -> dict:
    """Prepare a training example: its tokens, and which of them are trained on (label other than -100)."""
    tokens, ids, labels = (example.get(key) or [] for key in ("tokens", "input_ids", "labels"))
    marked = [
        {"text": str(token), "id": token_id, "trained": label not in (None, -100)}
        for token, token_id, label in itertools.zip_longest(tokens, ids, labels)
        if token is not None
    ]
    return {
        "text": example.get("text"),
        "tokens": marked[:MAX_TOKENS],
        "total": len(marked),
        "trained": sum(token["trained"] for token in marked),
    }


def group_settings(settings: dict) -> dict[str, list]:
    """Flatten nested settings to dotted names, grouped by their first name."""

    def flatten(value: Any, name: str) -> list:
        if isinstance(value, dict) and value:
            return [pair for key in value for pair in flatten(value[key], f"{name}.{key}")]
        return [(name, value)]

    groups: dict[str, list] = {}
    for key, value in settings.items():
        groups.setdefault(key if isinstance(value, dict) else "run", []).extend(flatten(value, key))
    return groups
