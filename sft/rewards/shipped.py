"""The rewards that ship with the project: each takes a completion and its row, is in [0, 1], pure, and never raises."""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sft.config.patterns import compile_pattern

ASCII = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: " ", 0x2212: "-", ord("负"): "-", ord("負"): "-"}
"""Fullwidth characters, and other minus signs, in ASCII."""

NUMBER = re.compile(
    r"(?:(?<![\w)\].])[-+](?=[$€£¥]?\.?\d))?[$€£¥]?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE](?P<power>[-+]?\d{1,3})(?!\w))?"
)

CHINESE = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
UNITS = {"十": 10, "百": 100, "千": 1000}
LARGE = {"万": 10**4, "亿": 10**8}
IN_WORDS = re.compile(f"-?[{''.join([*CHINESE, *UNITS, *LARGE])}]+")

CJK = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
"""Characters of languages that write no spaces between words."""

WORD = re.compile(rf"{CJK}|(?:(?!{CJK})\w)+")

DEPTH = 50
"""Levels of JSON that are compared with a schema."""


def number(completion: str, row: dict) -> float:
    """1 if the last number of the completion is the last one of the reference answer: 1,000 = 1000, 3.0 = 3."""
    wanted = last_number(_reference(row))
    return float(wanted is not None and last_number(after_thoughts(completion)) == wanted)


def after_thoughts(text: str) -> str:
    """What follows the thoughts of a reasoning model; nothing where they do not end."""
    _, end, rest = text.rpartition("</think>")
    return rest if end or "<think>" not in text else ""


def _reference(row: dict) -> str:
    return after_thoughts(str(row.get("answer") or ""))


def last_number(text: str) -> Decimal | None:
    """The last number in digits, or else the last one in Chinese words; None without any."""
    text = text.translate(ASCII).replace("{,}", ",")
    if numbers := list(NUMBER.finditer(text)):
        found = numbers[-1]
        value = Decimal(found["digits"].replace(",", "") + (f"E{found['power']}" if found["power"] else ""))
        return -value if found[0].startswith("-") else value
    words = IN_WORDS.findall(text)
    return _in_words(words[-1]) if words else None


def _in_words(text: str) -> Decimal:
    """The value of a number in Chinese words: 二十二, 一千零五, or digit by digit, 二零二六."""
    digits = text.lstrip("-")
    if not any(char in UNITS or char in LARGE for char in digits):
        value = Decimal("".join(str(CHINESE[char]) for char in digits))
    else:
        total = section = digit = 0
        for char in digits:
            if char in CHINESE:
                digit = CHINESE[char]
            elif char in UNITS:
                section, digit = section + (digit or 1) * UNITS[char], 0
            else:
                whole = section + digit
                larger, total = (total, 0) if LARGE[char] > total else (0, total)
                total, section, digit = total + (larger + whole or 1) * LARGE[char], 0, 0
        value = Decimal(total + section + digit)
    return -value if text.startswith("-") else value


def exact(completion: str, row: dict) -> float:
    """1 if the completion is the reference answer, white space around and between words aside."""
    wanted = _folded(_reference(row))
    return float(bool(wanted) and _folded(after_thoughts(completion)) == wanted)


def contains(completion: str, row: dict, text: str | None = None) -> float:
    """1 if `text`, or else the reference answer, stands in the completion, and not inside a longer word or number."""
    wanted = _folded(text if text is not None else _reference(row))
    if not wanted:
        return 0.0
    before = r"(?<![A-Za-z0-9])" if re.match("[A-Za-z0-9]", wanted) else ""
    after = r"(?![A-Za-z0-9])" if re.match("[A-Za-z0-9]", wanted[-1]) else ""
    return float(re.search(f"{before}{re.escape(wanted)}{after}", _folded(after_thoughts(completion))) is not None)


def regex(completion: str, row: dict, pattern: str = "") -> float:
    """1 if the pattern matches somewhere in the completion."""
    return float(compile_pattern(pattern).search(completion) is not None)


def json_schema(completion: str, row: dict, **schema: Any) -> float:
    """1 if the completion is JSON and nothing else, and fits the schema if there is one."""
    try:
        value = json.loads(after_thoughts(completion), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(_fits(value, schema, DEPTH))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and (isinstance(value, int) or _is_whole(value)),
}


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _fits(value: Any, schema: dict[str, Any], depth: int) -> bool:
    """Whether a value fits a schema of `type`, `required`, `properties`, `items` and `enum`."""
    if depth == 0:
        return False
    if "type" in schema and not TYPES[schema["type"]](value):
        return False
    if "enum" in schema and not any(_equal(value, one) for one in schema["enum"]):
        return False
    if isinstance(value, dict):
        if any(key not in value for key in schema.get("required", [])):
            return False
        parts = schema.get("properties", {})
        return all(_fits(value[key], part, depth - 1) for key, part in parts.items() if key in value)
    if isinstance(value, list) and "items" in schema:
        return all(_fits(one, schema["items"], depth - 1) for one in value)
    return True


def _equal(value: Any, wanted: Any) -> bool:
    """Whether two values are the same to JSON, for which true is not 1."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def ends(completion: str, row: dict) -> float:
    """1 if the completion ended by itself, before `method.max_completion_length`."""
    return float(row.get("finish") == "ended")


def length(completion: str, row: dict, words: int = 40) -> float:
    """1 up to so many words, falling to 0 at twice as many; a Chinese character counts as a word."""
    return min(1.0, max(0.0, 2 - len(words_of(completion)) / words))


def repetition(completion: str, row: dict, n: int = 3) -> float:
    """1 minus the share of runs of `n` words that stood before."""
    found = words_of(completion)
    runs = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; a Chinese character is one."""
    return WORD.findall(text.lower())


def format_(completion: str, row: dict) -> float:
    """1 if exactly one <think>...</think> stands at the beginning, and an answer after it."""
    once = completion.count("<think>") == completion.count("</think>") == 1
    found = re.fullmatch(r"\s*<think>.*</think>(.*)", completion, re.S) if once else None
    return float(found is not None and bool(found[1].strip()))


def _folded(text: str) -> str:
    return " ".join(text.split())


FUNCTIONS: dict[str, Callable[..., float]] = {
    "number": number,
    "exact": exact,
    "contains": contains,
    "regex": regex,
    "json_schema": json_schema,
    "ends": ends,
    "length": length,
    "repetition": repetition,
    "format": format_,
}
"""The shipped rewards by name; `sft/config/reward_names.py` has their options."""
