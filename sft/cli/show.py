"""Show a run at a glance: its curves as a picture, and its completions from before and after training.

    python scripts/show_run.py run=outputs/<run>

    python scripts/show_run.py run=outputs/<run> --json      the same as one JSON object

Writes curves.png into the run folder and prints the completions. It reads only what the run folder holds, so it also works
while the run is going on. The whole report, to look at in a browser, is report.html in the same folder.
"""

from pathlib import Path
from typing import Any

import vl_convert

from sft import console
from sft.cli.target import find_run
from sft.config.method import facts_of
from sft.errors import Refusal, refuse
from sft.programs import as_called
from sft.report.charts import make_charts
from sft.report.samples import group_samples
from sft.report.summary import merge_steps, summarise
from sft.sanitize import shown
from sft.storage.jsonio import read_json, read_lines

SHOWN = {"reward": 420, "loss": 420, "eos_share": 220, "learning_rate": 220}
"""Charts of the report and their width in the picture; a reward stands for the loss."""
BLUE, ORANGE = "#3557c9", "#c2561a"


@console.takes_json
def main(argv: list[str]) -> int:
    """Show the run that `argv` names; returns the exit code."""
    if {"-h", "--help"} & set(argv) or not argv:
        print(as_called(__doc__))
        return 0
    try:
        stray = [word for word in argv if not word.startswith("run=")]
        if stray:
            raise refuse(stray[0], "Only the run can be named here.", "run=outputs/<run>")
        folder, _ = find_run(argv[-1].partition("=")[2])
    except Refusal as refusal:
        console.say_refusal(refusal)
        return 2
    status = read_json(folder / "run.json").get("status")
    picture = draw_curves(folder)
    if console.wants_json():
        console.say_json(as_json(folder, picture))
        return 0
    print(f"{folder.name}: {status}; " + (f"curves in {picture}" if picture else "no curves yet"))
    print(completions_text(read_lines(folder / "samples.jsonl")))
    return 0


def as_json(folder: Path, picture: Path | None) -> dict[str, Any]:
    """A run as plain values: how it ended, its figures, and what prompts were completed to, the first time and the last."""
    run, samples = read_json(folder / "run.json"), []
    for prompt in group_samples(read_lines(folder / "samples.jsonl"))["prompts"]:
        first, completions = prompt["first"], prompt["completions"]
        ends = [completions[step] for step in sorted({min(completions), max(completions)})]
        taken = [{key: one.get(key) for key in ("step", "completion", "finish")} for one in ends]
        samples.append({"prompt": first.get("question") or first.get("prompt"), "completions": taken})
    method = facts_of(run)
    return {
        "run": str(folder),
        **{key: run.get(key) for key in ("name", "status", "reason", "command", "config_hash")},
        "metric": method.metric,
        "metrics": summarise(run, merge_steps(read_lines(folder / "metrics.jsonl"))),
        "curves": str(picture) if picture else None,
        "samples": samples,
    }


def draw_curves(folder: Path) -> Path | None:
    """Draw the run's curves side by side into curves.png and return its path; None where nothing was recorded."""
    rows = merge_steps(read_lines(folder / "metrics.jsonl"))
    charts = {chart["name"]: chart for chart in make_charts(read_json(folder / "run.json"), rows) if chart["spec"]}
    if "reward" in charts:
        charts.pop("loss", None)
    parts = [
        chart["spec"] | {"title": _title(chart), "width": SHOWN[name], "height": 220, "layer": _still(chart["spec"])}
        for name, chart in charts.items()
        if name in SHOWN
    ]
    if not parts:
        return None
    spec = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "hconcat": parts, "config": _theme()}
    target = folder / "curves.png"
    target.write_bytes(vl_convert.vegalite_to_png(spec, scale=1.5))
    return target


def completions_text(samples: list[dict]) -> str:
    """The questions with their first and last completion, as text."""
    lines = []
    for prompt in group_samples(samples)["prompts"]:
        first, completions = prompt["first"], prompt["completions"]
        lines.append(f"\n{shown(first.get('question') or first.get('prompt') or '').strip()}")
        for step in sorted({min(completions), max(completions)}):
            text = shown(completions[step].get("completion") or "").strip() or "(white space)"
            end = "" if completions[step].get("finish") == "eos" else " ..."
            lines.append(f"  {'before' if step == 0 else f'step {step}':<9}" + text.replace("\n", "\n" + " " * 11) + end)
    return "\n".join(lines) or "\nNo completions: samples.num_held_out=0"


def _still(spec: dict) -> list[dict]:
    """The layers of a chart without the rule under the pointer, which a picture has no use for."""
    return [layer for layer in spec["layer"] if "params" not in layer]


def _title(chart: dict) -> dict:
    """The title, and under it which colour is which where there are several lines."""
    names = {"raw": "pale blue", "main": "blue", "held": "orange"}
    legend = [f"{names[style]}: {label.lower()}" for _, label, style in chart["lines"] if style in names]
    return {"text": chart["title"], "subtitle": "; ".join(legend) if len(legend) > 1 else " "}  # a blank keeps them level


def _theme() -> dict:
    def line(color: str, width: float) -> dict:
        return {"color": color, "strokeWidth": width, "strokeJoin": "round"}

    def dot(color: str) -> dict:
        return {"filled": True, "color": color, "size": 45, "opacity": 1}

    return {
        "background": "white",
        "view": {"stroke": None},
        "title": {"anchor": "start", "fontSize": 13, "subtitleColor": "#5f6168"},
        "axis": {"labelColor": "#5f6168", "gridColor": "#ecebe7", "domain": False, "ticks": False, "labelPadding": 9},
        "axisX": {"grid": False, "domain": True, "domainColor": "#e4e3de"},
        "style": {
            **{"raw": line("#b9c4ee", 1), "main": line(BLUE, 2), "thin": line(BLUE, 1.1), "held": line(ORANGE, 2)},
            **{"raw-dot": dot(BLUE), "main-dot": dot(BLUE), "thin-dot": dot(BLUE), "held-dot": dot(ORANGE)},
        },
    }
