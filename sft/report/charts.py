"""The curves of a run as Vega-Lite charts."""

import math

from sft.config.method import GRPO, facts_of
from sft.report.rollouts import reward_charts
from sft.report.texts import Say

MAX_POINTS = 1500  # a chart is about 1,000 pixels wide: more points only grow the file

FEWEST_POINTS = 3
"""Points from which on a curve is drawn: two say no more than their numbers do."""

WINDOW = 5
"""Points that a smoothed curve is a mean of, at least."""

ALONG = ("step", "tokens", "epoch")
"""What curves can be drawn along, as the reader of the page chooses (report.js)."""

# Field, title, d3 number format, lines: (field, label, style). The styles' colours live in report.css.
CHARTS = [
    (
        "loss",
        "Loss",
        ".4~f",
        [("loss", "Training", "raw"), ("smooth", "Training, smoothed", "main"), ("eval_loss", "Held-out", "held")],
    ),
    ("eos_share", "Completions ended by EOS", ".0%", [("eos_share", "EOS share", "held")]),
    ("learning_rate", "Learning rate", "~e", [("learning_rate", "Learning rate", "main")]),
    ("grad_norm", "Gradient norm", ".3~g", [("grad_norm", "Gradient norm", "thin")]),
    ("tokens_per_second", "Tokens per second", ".3~s", [("tokens_per_second", "Tokens/s", "thin")]),
    ("memory_gib", "Memory (GiB)", ".4~g", [("memory_gib", "Memory (GiB)", "main")]),
]


def make_charts(run: dict, rows: list[dict], say: Say = str, kept: float | None = None, fewest: int = 1) -> list[dict]:
    """The charts of a run by its method, drawn where a curve has at least `fewest` points. `say` translates their words; the
    weights of the step `kept` are marked on the held-out curve of what ranks runs.
    """
    if any(row.get("tokens") for row in rows):  # the first evaluation has seen none
        rows = [{"tokens": 0, **row} if not row["step"] else row for row in rows]
    if facts_of(run) is GRPO:
        rows, charts = reward_charts(rows, say)
        charts = [*charts, *CHARTS]
    else:
        charts = CHARTS
    found = []
    for at, (name, title, pattern, lines) in enumerate(charts):
        lines = [(field, say(label), style) for field, label, style in lines]
        found.append(make_chart(rows, name, say(title), pattern, lines, kept=None if at else kept, fewest=fewest))
    return found


def make_chart(
    rows: list[dict],
    name: str,
    title: str,
    pattern: str,
    lines: list[tuple[str, str, str]],
    *,
    kept: float | None = None,
    fewest: int = 1,
) -> dict:
    """Make one chart of the curves; its Vega-Lite spec is None where it has fewer than `fewest` points."""
    points: dict[float, dict] = {}
    smoothed = next((field for field, _, _ in lines), "")
    for field in [field for field, _, _ in lines if field != "smooth"]:
        curve = [
            {key: row[key] for key in (*ALONG, field) if row.get(key) is not None} for row in rows if row.get(field) is not None
        ]
        for point, value in zip(curve, smooth([point[field] for point in curve]), strict=True):
            point |= {"smooth": value} if field == smoothed else {}
        for point in downsample(curve, field):
            points.setdefault(point["step"], {}).update({key: float(f"{v:.7g}") for key, v in point.items()})
    lines = [line for line in lines if any(line[0] in point for point in points.values())]
    held = next((field for field, _, style in lines if style == "held"), None)
    mark = held if held and held in points.get(kept, {}) else None
    spec = draw([points[step] for step in sorted(points)], pattern, lines) if len(points) >= fewest and points else None
    if spec and mark:
        ring = {"type": "point", "style": "kept-dot"}
        place = {"y": {"field": mark, "type": "quantitative"}}
        spec["layer"].append({"data": {"values": [points[kept]]}, "mark": ring, "encoding": place})
    return {"name": name, "title": title, "lines": lines, "spec": spec, "points": len(points), "kept": bool(spec and mark)}


def smooth(values: list[float]) -> list[float]:
    """Smooth with an exponential moving average over WINDOW points, or more of a longer curve, unbiased at its start."""
    keep, total, weight, smoothed = 1 - 1 / max(WINDOW, len(values) / 25), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def downsample(curve: list[dict], field: str) -> list[dict]:
    """Thin a curve to MAX_POINTS, keeping both ends and the lowest and highest of each stretch: the spikes."""
    if len(curve) <= MAX_POINTS:
        return curve
    last = len(curve) - 1
    size = math.ceil((last - 1) / ((MAX_POINTS - 2) // 2))
    stretches = [range(start, min(start + size, last)) for start in range(1, last, size)]
    chosen = {choose(stretch, key=lambda i: curve[i][field]) for stretch in stretches for choose in (min, max)}
    return [curve[i] for i in sorted(chosen | {0, last})]


def draw(points: list[dict], pattern: str, lines: list[tuple[str, str, str]]) -> dict:
    """Write a Vega-Lite spec: a line per field, dots where there are few, and a rule under the pointer."""
    layers: list[dict] = []
    for field, _, style in lines:
        place = {
            "transform": [{"filter": f"isValid(datum.{field})"}],
            "encoding": {"y": {"field": field, "type": "quantitative"}},
        }
        layers.append({**place, "mark": {"type": "line", "style": style}})
        few = sum(field in point for point in points) <= (60 if style == "held" else 1)
        layers += [{**place, "mark": {"type": "point", "style": f"{style}-dot"}}] if few else []
    tooltip = [
        {"field": field, "type": "quantitative", "title": label, "format": form}
        for field, label, form in [
            ("step", "Step", ",d"),
            ("epoch", "Epoch", ".2f"),
            *((f, label, pattern) for f, label, _ in lines),
        ]
    ]
    hover = {
        "name": "hover",
        "select": {"type": "point", "on": "pointerover", "clear": "pointerout", "nearest": True, "encodings": ["x"]},
    }
    layers.append(
        {
            "mark": {"type": "rule", "style": "hover"},
            "params": [hover],
            "encoding": {
                "opacity": {"condition": {"param": "hover", "empty": False, "value": 1}, "value": 0},
                "tooltip": tooltip,
            },
        }
    )
    x = {
        "field": "step",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": False},
        "axis": {"format": ",d", "tickMinStep": 1},
    }
    y = {"type": "quantitative", "title": None, "scale": {"zero": False}, "axis": {"format": pattern}}
    return {"data": {"values": points}, "width": "container", "layer": layers, "encoding": {"x": x, "y": y}}
