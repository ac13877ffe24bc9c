"""Turn a run folder into report.html: one file with the verdict, curves, samples, data facts and settings of the run.

The page opens from disk and asks the network for nothing: the chart library is written into it.
"""

import functools
import os
import re
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import jinja2
import vl_convert
from markupsafe import Markup

from sft.config.method import facts_of
from sft.paths import ASSETS
from sft.programs import as_called
from sft.report import formats
from sft.report.against import compare_runs
from sft.report.charts import FEWEST_POINTS, make_charts
from sft.report.exports import describe_exports
from sft.report.formats import group_settings, mark_tokens
from sft.report.pairs import summarise_pairs
from sft.report.rollouts import summarise_rollouts
from sft.report.samples import judge_samples
from sft.report.summary import merge_steps, summarise
from sft.report.texts import Say, language_of, speaker
from sft.report.verdict import judge
from sft.storage.cache import made_once
from sft.storage.jsonio import read_json, read_lines


def write_report(run_folder: Path, run: dict | None = None) -> Path:
    """Write report.html into a finished, stopped or failed run's folder and return its path.

    `run` stands for the contents of a run.json that is written later, because its finished mark comes last.
    """
    run_folder = Path(run_folder)
    run = {k: v for k, v in run.items() if v is not None} if run else read_json(run_folder / "run.json")
    preflight, verify = read_json(run_folder / "preflight.json"), read_json(run_folder / "export" / "verify.json")
    rows, margins = merge_steps(read_lines(run_folder / "metrics.jsonl")), read_lines(run_folder / "margins.jsonl")
    metrics, say = summarise(run, rows), speaker(language_of(run))
    charts = make_charts(run, rows, say, metrics.get("kept_step"), FEWEST_POINTS)
    page = render(
        {
            "run": run,
            "lang": language_of(run),
            "say": say,
            "name": run_folder.resolve().name,
            "method": facts_of(run),
            "metrics": metrics,
            "verdict": judge({**run, "metrics": metrics}, rows, read_lines(run_folder / "eval_rows.jsonl"), margins, say),
            "against": compare_runs(run_folder, run, say),
            "charts": charts,
            "pairs": summarise_pairs(margins, say),
            "rollouts": summarise_rollouts(run_folder / "rollouts.jsonl"),
            "broken": find_broken(rows),
            "samples": judge_samples(read_lines(run_folder / "samples.jsonl")),
            "preflight": preflight,
            "exports": verify,
            "worth": describe_exports(verify, say),
            "examples": [mark_tokens(example) for example in preflight.get("examples", [])],
            "settings": group_settings(run.get("settings", {})),
            "commands": next_commands(run_folder, run, verify, say),
            "links": find_links(run_folder, run),
            "sweep": (run_folder.resolve().parent / "sweep.json").is_file(),
        }
    )
    target, temporary = run_folder / "report.html", run_folder / f".report.html-{os.getpid()}"
    temporary.write_bytes(page.encode("utf-8", errors="replace"))  # a cut emoji may leave half a surrogate pair
    os.replace(temporary, target)
    return target


def find_broken(rows: list[dict]) -> list[tuple[str, int, float]]:
    """List the curves that hold values that are not finite numbers: name, how many, first step."""
    steps: dict[str, list] = {}
    for row in rows:
        for key in (key for key in row if row[key] is None):
            steps.setdefault(key, []).append(row["step"])
    return [(key, len(found), found[0]) for key, found in steps.items()]


def next_commands(run_folder: Path, run: dict, verify: dict, say: Say) -> list[tuple[str, str]]:
    """(what it is for, command) of what can be done next with a run, typed where the run was started."""
    kept, status = run.get("artifacts") or {}, run.get("status")
    place = run_folder.resolve()
    if isinstance(run.get("working_folder"), str) and Path(run["working_folder"]).is_dir():
        relative = os.path.relpath(place, run["working_folder"])
        place = place if relative.startswith("..") else relative
    named = [(say("Talk to it"), "scripts/chat.py run={place}")] if {"adapter", "model"} & kept.keys() else []
    if named and not verify.get("artifacts"):
        named.append((say("Export it for llama.cpp and Ollama"), "scripts/export.py run={place} export=gguf"))
    if status in ("stopped", "failed", "running"):
        named.append((say("Go on with the training"), "train.py resume={place}"))
    elif named:
        named.append((say("Show it in the terminal"), "scripts/show_run.py run={place}"))
    words = "model.trust_remote_code=true" if ((run.get("settings") or {}).get("model") or {}).get("trust_remote_code") else ""
    typed = [as_called(f"python {text}").replace("{place}", shlex.quote(str(place))) for _, text in named]
    return [(title, f"{command} {words}".strip()) for (title, _), command in zip(named, typed, strict=True)]


def find_links(run_folder: Path, run: dict) -> dict[str, str]:
    """Where texts of the page lead: files of the run folder, and the page of the tracker."""
    tracking = run.get("tracking") or {}
    found = {}
    for place in (run.get("artifacts") or {}).values():
        inside = isinstance(place, str) and not Path(place).is_absolute() and ".." not in Path(place).parts
        if inside and place != "report.html" and os.path.exists(run_folder / place):
            found[place] = quote(place)
    url = tracking.get("url")
    if isinstance(url, str) and re.fullmatch(r"https?://[^\s<>\"']+", url):
        found[url] = url
    return found


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
    jinja.filters |= {name: getattr(formats, name) for name in formats.FILTERS}
    return jinja.get_template(name)


def render(context: dict, template: str = "report.html.j2") -> str:
    """Fill the template, which escapes every value, and write the chart library into it."""
    library = chart_library(bundled_charts)
    return find_template(template).render(context, library=Markup(library))
