"""The charts of a sweep's page: all curves on one plot, the mean of each setting, and what the settings did."""

import functools
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from sft.config.method import METHODS
from sft.report.charts import MAX_POINTS, downsample
from sft.report.formats import setting
from sft.report.summary import merge_steps
from sft.report.texts import Say
from sft.storage.jsonio import read_lines
from sft.sweep.leaderboard import ALL_SEEDS, Leaderboard, TableRow, setting_groups

PALETTE = (
    *("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2"),
    *("#eeca3b", "#9d755d", "#ff9da6", "#79706e", "#3557c9", "#2a9d8f"),
)
"""Colours of lines that a legend names. The legend is part of the page, below the plot, so that it leaves a phone its plot."""

MOST_MEANS = 20
"""Settings whose means are shown, the best ones."""


def draw_charts(board: Leaderboard, say: Say) -> list[dict]:
    """The charts that there is something for."""
    drawn = (draw_curves(board, say), draw_means(board, say), draw_effect(board, say), draw_parallel(board, say))
    return [chart for chart in drawn if chart]


def draw_curves(board: Leaderboard, say: Say) -> dict | None:
    """What ranks the runs over the steps, a line a run; its value in training where nothing was held out."""
    curves = {row.job.label: _curve(stamp(board.index.folder / row.job.folder / "metrics.jsonl")) for row in board.rows}
    metric, noun = board.method.metric, board.method.noun
    field = metric if any(metric in point for curve in curves.values() for point in curve) else noun
    order, points = [], []
    for label, curve in curves.items():
        found = downsample([p for p in curve if p.get(field) is not None], field)[: MAX_POINTS // 3]
        points += [{"run": label, "step": p["step"], noun: float(f"{p[field]:.6g}")} for p in found]
        order += [label] if found else []
    if not points:
        return None
    color, legend = _colors("run", order, say)
    encoding = {
        "x": {"field": "step", "type": "quantitative", "title": say("step"), "axis": {"tickMinStep": 1}},
        "y": {"field": noun, "type": "quantitative", "title": None, "scale": {"zero": False}},
        "color": color,
        "tooltip": _tooltip(say, noun, [{"field": "step", "title": say("step")}]),
    }
    layer = [{"mark": {"type": "line", "strokeWidth": 1.7}}, {"mark": {"type": "point", "filled": True, "size": 34}}]
    trained = say("Training loss" if noun == "loss" else "Training reward")
    title = say(board.method.title.capitalize()) if field == metric else trained
    spec = _spec(points, {"layer": layer, "encoding": encoding})
    return {"name": "curves", "title": title, "wide": True, "legend": legend, "spec": spec}


def draw_means(board: Leaderboard, say: Say) -> dict | None:
    """The mean of each setting over its seeds, with what the noise between seeds leaves open; None where it is not known."""
    groups = setting_groups(board, [row for row in board.rows if row.rank])
    if not board.noise or len(groups) < 2:
        return None
    keys = [key for key in board.keys if key not in ALL_SEEDS]
    points = []
    for group in groups[:MOST_MEANS]:
        mean, half = fmean(board.value(row) for row in group), board.noise_factor * board.noise / math.sqrt(len(group))
        label = ", ".join(f"{_short(key)} {_text(group[0].values[key])}" for key in keys) or say("all")
        numbers = {"mean": mean, "low": mean - half, "high": mean + half}
        points.append({"setting": label, "seeds": len(group), **{k: float(f"{v:.6g}") for k, v in numbers.items()}})
    x = {"type": "quantitative", "title": None, "scale": {"zero": False}}
    order = [point["setting"] for point in points]
    y = {"field": "setting", "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 190}}
    tooltip = [{"field": "setting", "title": say("setting")}, {"field": "seeds", "title": say("seeds")}]
    for name, title in (("mean", say("mean")), ("low", say("from")), ("high", say("to"))):
        tooltip.append({"field": name, "title": title, "format": ".4f"})
    layer = [
        {"mark": {"type": "rule", "style": "main", "strokeWidth": 2},
         "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "tooltip": tooltip}},
        {"mark": {"type": "point", "style": "main-dot"}, "encoding": {"x": {**x, "field": "mean"}, "tooltip": tooltip}},
    ]  # fmt: skip
    title = say("Mean of each setting, with the 95 % interval that the noise between seeds leaves")
    return {"name": "means", "title": title, "spec": _spec(points, {"layer": layer, "encoding": {"y": y}})}


def draw_effect(board: Leaderboard, say: Say) -> dict | None:
    """The learning rate (or the first other number that varies) against what ranks the runs, a line for each other value."""
    ranked = [row for row in board.rows if row.metric is not None]
    noun = board.method.noun
    numeric = [key for key in board.keys if key not in ALL_SEEDS and _is_numeric(ranked, key)]
    if not numeric:
        return None
    x = "trainer.learning_rate" if "trainer.learning_rate" in numeric else numeric[0]
    others = [key for key in board.keys if key not in (x, *ALL_SEEDS)]
    series = {row.job.number: ", ".join(f"{_short(key)} {row.values[key]}" for key in others) or say("all") for row in ranked}
    points = [
        {"x": row.values[x], noun: board.value(row), "series": series[row.job.number], "run": row.job.label} for row in ranked
    ]
    positive = all(point["x"] > 0 for point in points)
    form = "~s" if not positive else "~e" if max(point["x"] for point in points) < 0.01 else "~g"
    names = list(dict.fromkeys(sorted(series.values(), key=_natural)))
    color, legend = _colors("series", names, say)
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": _short(x), "axis": {"format": form},
              "scale": {"type": "log", "base": 2} if positive else {"zero": False}},
        "y": {"field": noun, "type": "quantitative", "title": None, "scale": {"zero": False}},
        "color": color,
    }  # fmt: skip
    if positive:
        encoding["x"]["axis"]["values"] = sorted({point["x"] for point in points})
    mean = {"y": {**encoding["y"], "aggregate": "mean"}}
    tooltip = _tooltip(say, noun, [{"field": "x", "title": _short(x)}])
    layer = [
        {"mark": {"type": "line", "strokeWidth": 1.7}, "encoding": mean},
        {"mark": {"type": "point", "filled": True, "size": 55}, "encoding": {"tooltip": tooltip}},  # of one run, and no mean
    ]
    title = say("{x} against {y}", x=_short(x), y=title_of(board, say))
    title += say(", by {keys}", keys=", ".join(map(_short, others))) if others else ""
    legend = legend if len(names) > 1 else []
    return {"name": "effect", "title": title, "legend": legend, "spec": _spec(points, {"layer": layer, "encoding": encoding})}


def draw_parallel(board: Leaderboard, say: Say) -> dict | None:
    """Parallel coordinates: an axis for each varying setting and one for what ranks the runs, a line a run."""
    ranked = [row for row in board.rows if row.metric is not None]
    if len(ranked) < 2 or not board.keys:
        return None
    noun = board.method.noun
    axes, labels = [*map(_short, board.keys), title_of(board, say)], []
    places: dict[int, list[float]] = {row.job.number: [] for row in ranked}
    for key, axis in zip(board.keys, axes, strict=False):
        values = sorted({row.values[key] for row in ranked}, key=lambda v: (isinstance(v, str), v))
        for row in ranked:
            places[row.job.number].append(values.index(row.values[key]) / max(1, len(values) - 1))
        shown = values if len(values) <= 12 else [values[0], values[-1]]
        labels += [{"axis": axis, "place": values.index(v) / max(1, len(values) - 1), "text": _text(v)} for v in shown]
    low, high = sorted((board.value(ranked[0]), board.value(ranked[-1])))
    for row in ranked:
        places[row.job.number].append((board.value(row) - low) / ((high - low) or 1.0))
    labels += [{"axis": axes[-1], "place": p, "text": f"{value:.4f}"} for p, value in {0.0: low, 1.0: high}.items()]
    lines = [
        {"run": row.job.label, "axis": axis, "place": place, "rank": row.rank, noun: board.value(row)}
        for row in ranked
        for axis, place in zip(axes, places[row.job.number], strict=True)
    ]
    x = {"field": "axis", "type": "nominal", "sort": axes, "title": None, "scale": {"type": "point", "padding": 0.35}}
    x["axis"] = {"orient": "top", "grid": True, "labelAngle": 0, "domain": False}
    y = {"field": "place", "type": "quantitative", "axis": None, "scale": {"domain": [-0.04, 1.04]}}
    color = {"field": "rank", "type": "quantitative", "legend": None, "scale": {"range": "ramp"}}
    width = {"condition": {"test": "datum.rank === 1", "value": 4}, "value": 1.5}
    text = {"data": {"values": labels}, "encoding": {"text": {"field": "text"}}}
    placed = {"type": "text", "align": "left", "dx": 7}
    layer = [
        {"mark": {"type": "line", "opacity": 0.9},
         "encoding": {"detail": {"field": "run"}, "color": color, "strokeWidth": width, "order": {"field": "order"},
                      "tooltip": _tooltip(say, noun, [])}},
        {**text, "mark": {**placed, "style": "axis-halo"}},
        {**text, "mark": {**placed, "style": "axis-value"}},
    ]  # fmt: skip
    for line in lines:
        line["order"] = axes.index(line["axis"])
    spec = _spec(lines, {"layer": layer, "encoding": {"x": x, "y": y}})
    title = say("Settings and {metric}, a line a run; the best is thick", metric=title_of(board, say))
    return {"name": "parallel", "title": title, "legend": _ends(say), "spec": spec}


def title_of(board: Leaderboard, say: Say) -> str:
    """What ranks the runs, in words."""
    name = say(board.method.title)
    return say("change of the {name}", name=name) if board.by_change else name


def _colors(field: str, names: list[str], say: Say) -> tuple[dict, list[dict[str, str]]]:
    """(the colour of each name, in their order; the legend as it stands below the plot)."""
    color = {"field": field, "type": "nominal", "sort": names, "legend": None}
    if len(names) > len(PALETTE):
        return {**color, "scale": {"domain": names, "range": "ramp"}}, _ends(say) if field == "run" else []
    legend = [{"color": tint, "label": name} for tint, name in zip(PALETTE, names, strict=False)]
    return {**color, "scale": {"domain": names, "range": [one["color"] for one in legend]}}, legend


def _ends(say: Say) -> list[dict[str, str]]:
    """The legend of runs that are coloured from the best to the worst."""
    return [{"style": style, "label": label} for style, label in (("main", say("the best")), ("held", say("the worst")))]


def _tooltip(say: Say, noun: str, others: list[dict]) -> list[dict]:
    run, value = {"field": "run", "type": "nominal", "title": say("run")}, {"field": noun, "title": say(noun), "format": ".4f"}
    return [run, *others, value]


def _spec(points: list[dict], rest: dict) -> dict:
    return {"data": {"values": points}, "width": "container", **rest}


def _is_numeric(rows: list[TableRow], key: str) -> bool:
    values = [row.values[key] for row in rows]
    return len(set(values)) > 1 and all(isinstance(value, int | float) for value in values)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _text(value: Any) -> str:
    return setting(float(f"{value:g}")) if isinstance(value, float) else str(value)


def _natural(text: str) -> tuple:
    """Sorts `r 8` before `r 16`."""
    return tuple((0, float(word), "") if word.replace(".", "", 1).isdigit() else (1, 0.0, word) for word in text.split())


def stamp(path: Path) -> tuple[str, int, int]:
    """A file and what changes when it does, so that a finished run is read once and not after every job."""
    found = path.stat() if path.is_file() else None
    return (str(path), found.st_mtime_ns, found.st_size) if found else (str(path), 0, 0)


@functools.lru_cache(maxsize=2000)
def _curve(stamp: tuple[str, int, int]) -> list[dict]:
    keys = {"step", *(key for method in METHODS.values() for key in (method.noun, method.metric))}
    return [{k: row[k] for k in keys if row.get(k) is not None} for row in merge_steps(read_lines(Path(stamp[0])))]
