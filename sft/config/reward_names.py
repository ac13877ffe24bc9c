"""Rewards by name: those that ship with the project, with their options, and functions of the user's own. Imports nothing
heavy."""

from pathlib import Path
from typing import Any

from sft.config.own_code import own_function

SHIPPED: dict[str, dict[str, Any]] = {
    "number": {},
    "exact": {},
    "contains": {"text": str},
    "regex": {"pattern": str},
    "json_schema": {"type": str, "required": list, "properties": dict, "items": dict, "enum": list},
    "ends": {},
    "length": {"words": int},
    "repetition": {"n": int},
    "format": {},
}
"""{name: {option: its type}} of the shipped rewards."""

NEEDED = {"regex": "pattern"}
"""The option without which a reward says nothing."""

JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

COMPARING = ("number", "exact", "contains")
"""Rewards that compare with the reference answer; `contains` only without its option."""


def short_name(name: str) -> str:
    """The name that a reward has in charts and tables: that of its function, without the file."""
    own = own_function(name)
    return own.function if own else name


def reward_files(names: list[str]) -> dict[str, Path]:
    """The files of the user's own rewards, by what `method.reward_funcs` calls each."""
    return {name: own.file for name in names if (own := own_function(name))}
