"""A sweep's report.html: the table, its remarks, all curves on one plot, what the settings did, and the completions beside
each other. Like a run's report it is one file that asks the network for nothing.
"""

import functools
import os
from pathlib import Path
from typing import Any

from sft.config.method import METHODS
from sft.report.charts import MAX_POINTS, downsample
from sft.report.page import render
from sft.report.summary import merge_steps
from sft.storage.jsonio import number, read_lines
from sft.sweep.index import FINISHED
from sft.sweep.leaderboard import Leaderboard, TableRow

MAX_RUNS = 60
"""Runs whose completions are shown; with more the page would be slow to open."""

MAX_COMPLETION = 1200
"""Characters shown of a completion."""


def write_sweep_report(board: Leaderboard) -> Path:
    """Write report.html into the sweep's folder, whole or not at all, and return its path."""
    folder = board.index.folder
    charts = [chart for chart in (draw_curves(board), draw_effect(board), draw_parallel(board)) if chart]
    page = render(
        {
            "name": folder.resolve().name,
            "board": board,
            "index": board.index,
            "counts": _counts(board),
            "seconds": sum(row.job.seconds for row in board.rows),
            "gpu_hours": sum(row.gpu_hours or 0.0 for row in board.rows) or None,
            "charts": charts,
            "prompts": gather_completions(board),
            "remarks": pair_commands(board),
        },
        "sweep.html.j2",
    )
    target = folder / "report.html"
    temporary = folder / f".report.html.{os.getpid()}"
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(temporary, target)
    return target


def pair_commands(board: Leaderboard) -> list[tuple[str, str | None]]:
    """Each remark with the command it announces."""
    commands = iter(board.next_commands)
    return [(text, next(commands, None) if text.endswith(":") else None) for text in board.remarks]


def _counts(board: Leaderboard) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in board.rows:
        counts[row.job.status] = counts.get(row.job.status, 0) + 1
    return counts


# ------------------------------------------------------------------------------------------------------- the charts


def draw_curves(board: Leaderboard) -> dict | None:
    """What ranks the runs over the steps, a line a run; its value in training where nothing was held out."""
    curves = {row.job.label: _curve(_stamp(board.index.folder / row.job.folder / "metrics.jsonl")) for row in board.rows}
    metric, noun = board.method.metric, board.method.noun
    field = metric if any(metric in point for curve in curves.values() for point in curve) else noun
    order, points = [], []
    for label, curve in curves.items():
        found = downsample([p for p in curve if p.get(field) is not None], field)[: MAX_POINTS // 3]
        points += [{"run": label, "step": p["step"], noun: float(f"{p[field]:.6g}")} for p in found]
        order += [label] if found else []
    if not points:
        return None
    color: dict[str, Any] = {"field": "run", "type": "nominal", "sort": order, "scale": {"domain": order}}
    color["legend"] = {"title": None, "symbolType": "stroke", "labelLimit": 420} if len(order) <= 12 else None
    if len(order) > 12:
        color["scale"]["scheme"] = {"name": "viridis", "extent": [0.1, 0.95]}
    encoding = {
        "x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1}},
        "y": {"field": noun, "type": "quantitative", "title": None, "scale": {"zero": False}},
        "color": color,
        "tooltip": [{"field": "run", "type": "nominal"}, {"field": "step"}, {"field": noun, "format": ".4f"}],
    }
    layer = [{"mark": {"type": "line", "strokeWidth": 1.7}}, {"mark": {"type": "point", "filled": True, "size": 34}}]
    title = board.method.title.capitalize() if field == metric else f"Training {noun}"
    return {"name": "curves", "title": title, "wide": True, "spec": _spec(points, {"layer": layer, "encoding": encoding})}


def draw_effect(board: Leaderboard) -> dict | None:
    """The learning rate (or the first other number that varies) against what ranks the runs, a line for each other value."""
    ranked = [row for row in board.rows if row.metric is not None]
    noun = board.method.noun
    numeric = [key for key in board.keys if key != "seed" and _is_numeric(ranked, key)]
    if not numeric:
        return None
    x = "trainer.learning_rate" if "trainer.learning_rate" in numeric else numeric[0]
    others = [key for key in board.keys if key not in (x, "seed")]
    series = {row.job.number: ", ".join(f"{_short(key)} {row.values[key]}" for key in others) or "all" for row in ranked}
    points = [{"x": row.values[x], noun: row.metric, "series": series[row.job.number], "run": row.job.label} for row in ranked]
    positive = all(point["x"] > 0 for point in points)
    names = list(dict.fromkeys(sorted(series.values(), key=_natural)))
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": _short(x), "axis": {"format": "~g" if positive else "~s"},
              "scale": {"type": "log", "base": 2} if positive else {"zero": False}},
        "y": {"field": noun, "type": "quantitative", "title": None, "scale": {"zero": False}},
        "color": {"field": "series", "type": "nominal", "sort": names, "scale": {"domain": names},
                  "legend": {"title": None} if 1 < len(names) <= 12 else None},
        "tooltip": [{"field": "run"}, {"field": "x", "title": _short(x)}, {"field": noun, "format": ".4f"}],
    }  # fmt: skip
    if positive:
        encoding["x"]["axis"]["values"] = sorted({point["x"] for point in points})
    mean = {"y": {**encoding["y"], "aggregate": "mean"}}
    layer = [
        {"mark": {"type": "line", "strokeWidth": 1.7}, "encoding": mean},
        {"mark": {"type": "point", "filled": True, "size": 55}},
    ]
    title = f"{_short(x)} against {board.method.title}" + (f", by {' and '.join(map(_short, others))}" if others else "")
    return {"name": "effect", "title": title, "spec": _spec(points, {"layer": layer, "encoding": encoding})}


def draw_parallel(board: Leaderboard) -> dict | None:
    """Parallel coordinates: an axis for each varying setting and one for what ranks the runs, a line a run."""
    ranked = [row for row in board.rows if row.metric is not None]
    if len(ranked) < 2 or not board.keys:
        return None
    noun = board.method.noun
    axes, labels = [*map(_short, board.keys), board.method.title], []
    places: dict[int, list[float]] = {row.job.number: [] for row in ranked}
    for key, axis in zip(board.keys, axes, strict=False):
        values = sorted({row.values[key] for row in ranked}, key=lambda v: (isinstance(v, str), v))
        for row in ranked:
            places[row.job.number].append(values.index(row.values[key]) / max(1, len(values) - 1))
        shown = values if len(values) <= 12 else [values[0], values[-1]]
        labels += [{"axis": axis, "place": values.index(v) / max(1, len(values) - 1), "text": _text(v)} for v in shown]
    low, high = sorted((ranked[0].metric, ranked[-1].metric))
    for row in ranked:
        places[row.job.number].append((row.metric - low) / ((high - low) or 1.0))
    labels += [{"axis": axes[-1], "place": p, "text": f"{value:.4f}"} for p, value in {0.0: low, 1.0: high}.items()]
    lines = [
        {"run": row.job.label, "axis": axis, "place": place, "rank": row.rank, noun: row.metric}
        for row in ranked
        for axis, place in zip(axes, places[row.job.number], strict=True)
    ]
    x = {"field": "axis", "type": "nominal", "sort": axes, "title": None, "scale": {"type": "point", "padding": 0.35}}
    x["axis"] = {"orient": "top", "grid": True, "labelAngle": 0, "domain": False}
    y = {"field": "place", "type": "quantitative", "axis": None, "scale": {"domain": [-0.04, 1.04]}}
    # The middle of the scheme can be seen on a light page and on a dark one.
    scheme = {"name": "viridis", "extent": [0.35, 0.9]}
    color = {"field": "rank", "type": "quantitative", "legend": None, "scale": {"scheme": scheme}}
    width = {"condition": {"test": "datum.rank === 1", "value": 4}, "value": 1.5}
    layer = [
        {"mark": {"type": "line", "opacity": 0.9},
         "encoding": {"detail": {"field": "run"}, "color": color, "strokeWidth": width, "order": {"field": "order"},
                      "tooltip": [{"field": "run"}, {"field": noun, "format": ".4f"}]}},
        {"data": {"values": labels}, "mark": {"type": "text", "align": "left", "dx": 7, "style": "axis-value"},
         "encoding": {"text": {"field": "text"}}},
    ]  # fmt: skip
    for line in lines:
        line["order"] = axes.index(line["axis"])
    spec = _spec(lines, {"layer": layer, "encoding": {"x": x, "y": y}})
    return {"name": "parallel", "title": f"Settings and {noun}, a line a run; the best is thick", "spec": spec}


def _spec(points: list[dict], rest: dict) -> dict:
    return {"data": {"values": points}, "width": "container", **rest}


def _is_numeric(rows: list[TableRow], key: str) -> bool:
    values = [row.values[key] for row in rows]
    return len(set(values)) > 1 and all(isinstance(value, int | float) for value in values)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _natural(text: str) -> tuple:
    """Sorts `r 8` before `r 16`."""
    return tuple((0, float(word), "") if word.replace(".", "", 1).isdigit() else (1, 0.0, word) for word in text.split())


# ---------------------------------------------------------------------------------------------------- the completions


def gather_completions(board: Leaderboard) -> list[dict]:
    """For each prompt the last completion of every run, the best run first; with the one before training and the reference."""
    prompts: dict[str, dict] = {}
    for row in board.rows[:MAX_RUNS]:
        if row.job.status != FINISHED:
            continue
        lines = _completions(_stamp(board.index.folder / row.job.folder / "samples.jsonl"))
        last = max((line["step"] for line in lines if number(line.get("step")) is not None), default=0)
        for line in lines:
            entry = prompts.setdefault(str(line.get("prompt")), {"first": line, "before": None, "completions": []})
            if line.get("step") == 0:
                entry["before"] = line
            if line.get("step") == last and last:
                text = str(line.get("completion") or "")
                shown = text if len(text) <= MAX_COMPLETION else text[:MAX_COMPLETION] + " …"
                entry["completions"].append({"row": row, "completion": shown, "finish": line.get("finish")})
    return [entry for entry in prompts.values() if entry["completions"]]


def _stamp(path: Path) -> tuple[str, int, int]:
    """A file and what changes when it does, so that a finished run is read once and not after every job."""
    found = path.stat() if path.is_file() else None
    return (str(path), found.st_mtime_ns, found.st_size) if found else (str(path), 0, 0)


@functools.lru_cache(maxsize=2000)
def _curve(stamp: tuple[str, int, int]) -> list[dict]:
    keys = {"step", *(key for method in METHODS.values() for key in (method.noun, method.metric))}
    return [{k: row[k] for k in keys if row.get(k) is not None} for row in merge_steps(read_lines(Path(stamp[0])))]


@functools.lru_cache(maxsize=2000)
def _completions(stamp: tuple[str, int, int]) -> list[dict]:
    return read_lines(Path(stamp[0]))
