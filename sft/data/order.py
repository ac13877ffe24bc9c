"""The held-out rows in an order whose first ones stand for all: what samples, exports and the report show of them."""

import re
from typing import Any

LOOKED_AT = 32
"""Rows that are put in order; as many as exports are compared on."""

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def spread_first(rows: Any) -> Any:
    """The same `datasets.Dataset` with its first LOOKED_AT rows in the order of `spread`."""
    from datasets import concatenate_datasets

    count = min(LOOKED_AT, len(rows))
    first = rows.select(range(count))
    order = spread([(row["question"] or row["reference"] or "", len(row["input_ids"])) for row in first])
    if order == [*range(count)]:
        return rows
    # One row each, because a data set with a list of indices has its table in the old order.
    parts = [rows.select(range(at, at + 1)) for at in order]
    return concatenate_datasets([*parts, *([rows.select(range(count, len(rows)))] if count < len(rows) else [])])


def spread(rows: list[tuple[str, int]]) -> list[int]:
    """Places of (text, length) in an order whose beginnings, however long, have scripts in turn and lengths of all kinds: of
    each script the row of middle length first, then those in the middle of each half, and so on.
    """
    scripts: dict[bool, list[int]] = {}
    for at, (text, _) in enumerate(rows):
        scripts.setdefault(bool(CJK.search(text)), []).append(at)
    turns = [_halves(sorted(places, key=lambda at: rows[at][1])) for places in scripts.values()]
    longest = max(map(len, turns), default=0)
    return [places[turn] for turn in range(longest) for places in turns if turn < len(places)]


def _halves(places: list[int]) -> list[int]:
    found, waiting = [], [places]
    while waiting:
        part = waiting.pop(0)
        if part:
            middle = len(part) // 2
            found.append(part[middle])
            waiting += [part[:middle], part[middle + 1 :]]
    return found
