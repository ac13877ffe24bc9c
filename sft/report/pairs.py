"""What the report shows of preferences: the margins of the held-out pairs, and pairs whose other side became likelier."""

import math
from typing import Any

from sft.report.texts import Say
from sft.storage.jsonio import number

BINS = 20
"""Bars that a histogram has at least half of, and hardly more than."""

MOST = 10
"""Pairs that are shown of those that changed in one direction."""


def summarise_pairs(lines: list[dict], say: Say = str) -> dict[str, Any] | None:
    """What the lines of margins.jsonl come to; None where there are none, as for a method without pairs.

    `flipped` are pairs whose chosen side is the likelier one at the last evaluation and was not at the first (`gained`), or the
    other way round: at most MOST of either kind, those that changed most first.
    """
    lines = [line for line in lines if line.get("margins")]
    if not lines:
        return None
    first, last = lines[0], lines[-1]
    margins = [margin for margin in last["margins"] if number(margin) is not None]
    found = {"count": len(margins), "above": sum(margin > 0 for margin in margins), "step": last.get("step")}
    found |= {"first_step": first.get("step"), "chart": {"name": "margins", "spec": draw_histogram(margins, say)}}
    texts = next((line["pairs"] for line in lines if line.get("pairs")), [])
    begun, ended = ([number(one) for one in line.get("log_ratios") or []] for line in (first, last))
    flipped = [
        {**(texts[i] if i < len(texts) else {}), "first": a, "last": b, "margin": number(last["margins"][i]), "gained": b > 0}
        for i, (a, b, _) in enumerate(zip(begun, ended, last["margins"], strict=False))
        if a is not None and b is not None and (a > 0) != (b > 0)
    ]
    flipped.sort(key=lambda one: (one["gained"], -abs(one["last"] - one["first"])))
    kinds = {name: [one for one in flipped if one["gained"] == gained] for name, gained in (("lost", False), ("gained", True))}
    found |= {name: len(some) for name, some in kinds.items()}
    return found | {"flipped": [one for some in kinds.values() for one in some[:MOST]]}


def draw_histogram(margins: list[float], say: Say = str) -> dict | None:
    """A Vega-Lite spec of bars, in another colour below 0, where one begins; None without margins."""
    if not margins:
        return None
    width = _round_up((max(margins) - min(margins)) / BINS)
    counts: dict[int, int] = {}
    for margin in margins:
        at = math.floor(margin / width)
        counts[at] = counts.get(at, 0) + 1
    bars = [
        {"from": float(f"{at * width:.7g}"), "to": float(f"{(at + 1) * width:.7g}"), "pairs": count}
        for at, count in sorted(counts.items())
    ]
    tooltip = [
        {"field": name, "type": "quantitative", "title": title}
        for name, title in (("from", say("Margin from")), ("to", say("to")), ("pairs", say("Pairs")))
    ]
    layers = [
        {"transform": [{"filter": f"datum.from {sign} 0"}], "mark": {"type": "bar", "style": style, "strokeWidth": 0}}
        for sign, style in (("<", "held"), (">=", "main"))
    ]
    encoding = {
        "x": {"field": "from", "bin": {"binned": True}, "type": "quantitative", "title": None, "axis": {"format": "~g"}},
        "x2": {"field": "to"},
        "y": {"field": "pairs", "type": "quantitative", "title": None, "axis": {"format": "d", "tickMinStep": 1}},
        "tooltip": tooltip,
    }
    return {"data": {"values": bars}, "width": "container", "layer": layers, "encoding": encoding}


def _round_up(width: float) -> float:
    """The next of 1, 2, 5, 10, 20 ... and their tenths; 1 for nothing."""
    if width <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(width))
    return next(step * unit for step in (1, 2, 5, 10) if step * unit >= width)
