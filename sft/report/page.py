"""Turn a run folder into report.html: one file with the curves, samples, data facts and settings of the run.

The page opens from disk and asks the network for nothing: the chart library is written into it.
"""

import datetime
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup, escape

from sft.config.method import GRPO, facts_of
from sft.paths import ASSETS
from sft.report.pairs import summarise_pairs
from sft.report.rollouts import reward_charts, summarise_rollouts
from sft.report.summary import merge_steps, summarise
from sft.storage.cache import made_once
from sft.storage.jsonio import number, read_json, read_lines

MAX_POINTS = 1500  # a chart is about 1,000 pixels wide: more points only grow the file

MAX_TOKENS = 3000  # tokens shown of one training example

# Field, title, d3 number format, lines: (field, label, style). The styles' colours live in the template's CSS.
CHARTS = [
    (
        "loss",
        "Loss",
        ".4~f",
        [("loss", "Training", "raw"), ("smooth", "Training, smoothed", "main"), ("eval_loss", "Held-out", "held")],
    ),
    ("eval_loss", "Held-out loss", ".4~f", [("eval_loss", "Held-out loss", "held")]),
    ("eos_share", "Completions ended by EOS", ".0%", [("eos_share", "EOS share", "held")]),
    ("learning_rate", "Learning rate", ".3~g", [("learning_rate", "Learning rate", "main")]),
    ("grad_norm", "Gradient norm", ".3~g", [("grad_norm", "Gradient norm", "thin")]),
    ("tokens_per_second", "Tokens per second", ".3~s", [("tokens_per_second", "Tokens/s", "thin")]),
    ("memory_gib", "Memory (GiB)", ".4~g", [("memory_gib", "Memory (GiB)", "main")]),
]

SPECIAL = re.compile(  # special tokens as the common chat templates write them
    r"(<[|｜][^|｜<>\s]{1,60}[|｜]>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|end_of_text)>"
    r"|</?think>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>)"
)


def write_report(run_folder: Path, run: dict | None = None) -> Path:
    """Write report.html into a finished, stopped or failed run's folder and return its path.

    `run` stands for the contents of a run.json that is written later, because its finished mark comes last.
    """
    run_folder = Path(run_folder)
    run = {k: v for k, v in run.items() if v is not None} if run else read_json(run_folder / "run.json")
    preflight = read_json(run_folder / "preflight.json")
    rows = merge_steps(read_lines(run_folder / "metrics.jsonl"))
    charts, pairs = make_charts(run, rows), summarise_pairs(read_lines(run_folder / "margins.jsonl"))
    page = render(
        {
            "run": run,
            "name": run.get("name") or run_folder.resolve().name,
            "method": facts_of(run),
            "metrics": summarise(run, rows),
            "charts": charts,
            "pairs": pairs,
            "rollouts": summarise_rollouts(run_folder / "rollouts.jsonl"),
            "broken": find_broken(rows),
            "samples": group_samples(read_lines(run_folder / "samples.jsonl")),
            "preflight": preflight,
            "exports": read_json(run_folder / "export" / "verify.json"),
            "examples": [mark_tokens(example) for example in preflight.get("examples", [])],
            "settings": group_settings(run.get("settings", {})),
        }
    )
    target, temporary = run_folder / "report.html", run_folder / f".report.html-{os.getpid()}"
    temporary.write_bytes(page.encode("utf-8", errors="replace"))  # a cut emoji may leave half a surrogate pair
    os.replace(temporary, target)
    return target


# Summarise


def find_broken(rows: list[dict]) -> list[tuple[str, int, float]]:
    """List the curves that hold values that are not finite numbers: name, how many, first step."""
    steps: dict[str, list] = {}
    for row in rows:
        for key in (key for key in row if row[key] is None):
            steps.setdefault(key, []).append(row["step"])
    return [(key, len(found), found[0]) for key, found in steps.items()]


def group_samples(samples: list[dict]) -> dict:
    """Group generations by prompt: the base model's completion (step 0) and the later ones by step."""
    prompts: dict[tuple, dict] = {}
    for sample in samples:
        if (step := number(sample.get("step"))) is not None:
            key = (str(sample.get("source")), str(sample.get("index")))
            prompts.setdefault(key, {"first": sample, "completions": {}})["completions"][step] = sample
    steps = sorted({step for prompt in prompts.values() for step in prompt["completions"]} - {0})
    return {"prompts": list(prompts.values()), "steps": steps}


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


# Charts


def make_charts(run: dict, rows: list[dict]) -> list[dict]:
    """The charts of a run by its method."""
    if facts_of(run) is not GRPO:
        return [make_chart(rows, *chart) for chart in CHARTS]
    rows, charts = reward_charts(rows)
    return [make_chart(rows, *chart) for chart in [*charts, *(chart for chart in CHARTS if chart[0] != "eval_loss")]]


def make_chart(rows: list[dict], name: str, title: str, pattern: str, lines: list[tuple[str, str, str]]) -> dict:
    """Make one chart of the curves; its Vega-Lite spec is None where nothing was recorded."""
    points: dict[float, dict] = {}
    smoothed = next((field for field, _, _ in lines), "")
    for field in [field for field, _, _ in lines if field != "smooth"]:
        curve = [
            {key: row[key] for key in ("step", "epoch", field) if row.get(key) is not None}
            for row in rows
            if row.get(field) is not None
        ]
        for point, value in zip(curve, smooth([point[field] for point in curve]), strict=True):
            point |= {"smooth": value} if field == smoothed else {}
        for point in downsample(curve, field):
            points.setdefault(point["step"], {}).update({key: float(f"{v:.7g}") for key, v in point.items()})
    lines = [line for line in lines if any(line[0] in point for point in points.values())]
    spec = draw([points[step] for step in sorted(points)], pattern, lines) if points else None
    return {"name": name, "title": title, "lines": lines, "spec": spec}


def smooth(values: list[float]) -> list[float]:
    """Smooth with an exponential moving average, wider for a longer curve and unbiased at its start."""
    keep, total, weight, smoothed = 1 - 1 / max(1, len(values) / 25), 0.0, 0.0, []
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


# Render: a filter gives None for what was not recorded, and the template says so


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
    """Write a setting's value as it would stand in a config file."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


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


@functools.cache
def chart_library(bundled: Callable[[], str]) -> str:
    """The charts' JavaScript in a form that cannot end its own tag."""
    return re.sub(r"<(/script|script|!--)", r"\\x3c\1", bundled(), flags=re.IGNORECASE)


def bundled_charts() -> str:
    """The charts' JavaScript, bundled once for a user: it takes two seconds, longer than all else about a report."""

    def bundle() -> str:
        return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")

    def make(folder: Path) -> None:
        (folder / "charts.js").write_text(bundle(), encoding="utf-8")

    try:
        place = made_once(f"charts/vl-convert-{version('vl-convert-python')}", make, hashes=True)
        return (place / "charts.js").read_text(encoding="utf-8")
    except OSError:  # a cache that cannot be written
        return bundle()


@functools.cache
def find_template(name: str) -> jinja2.Template:
    """Compile a template of the assets folder, once a process."""
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    jinja.filters |= {f.__name__: f for f in (fixed, short, duration, moment, setting, specials)}
    return jinja.get_template(name)


def render(context: dict, template: str = "report.html.j2") -> str:
    """Fill the template, which escapes every value, and write the chart library into it."""
    library = chart_library(bundled_charts)
    return find_template(template).render(context, library=Markup(library))
