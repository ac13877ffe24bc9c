"""A run beside an earlier one (`report.against`): which is better on the held-out rows that both were measured on."""

from pathlib import Path
from typing import Any

from sft.config.method import DPO, MethodFacts, facts_of
from sft.paths import expanded
from sft.report.texts import Say
from sft.report.verdict import judge_rows, line_of
from sft.storage.jsonio import number, read_json, read_lines


def compare_runs(folder: Path, run: dict, say: Say) -> dict[str, Any] | None:
    """A verdict, as `verdict.judge` gives it, on the kept weights of `run` in `folder` beside those of the run that its
    settings name; None where they name none.
    """
    place = ((run.get("settings") or {}).get("report") or {}).get("against")
    if not isinstance(place, str) or not place:
        return None
    begun = run.get("working_folder")
    path = Path(begun if isinstance(begun, str) else ".") / expanded(place)
    try:
        other = read_json(path / "run.json")
    except OSError:  # a path that the system cannot even look up
        other = {}
    method, name = facts_of(run), path.name or path.resolve().name
    why = _why_not(run, other, method, say)
    found = None if why else _compare(_values(path, other, method), _values(folder, run, method), method, name, say)
    if found:
        found["lines"] = [_of_metric(method, name, other, run, say), *found["lines"]]
        return found
    lines = [why or say("One of them kept no values of single rows.")]
    return {"tone": "warn", "headline": say("It cannot be compared with {name}", name=name), "lines": lines}


def _why_not(run: dict, other: dict, method: MethodFacts, say: Say) -> str:
    if not other:
        return say("There is no run.json any more that could be read.")
    if facts_of(other) is not method:
        return say("It was trained by another method, whose numbers mean something else.")
    hashes = [(one.get("data") or {}).get("held_out_hash") for one in (run, other)]
    if None in hashes or hashes[0] != hashes[1]:
        return say("Other rows were held out there: give both runs the same data and the same dataset.seed.")
    return ""


def _values(folder: Path, run: dict, method: MethodFacts) -> dict:
    """What the kept weights of a run have in each held-out row: `losses` and `targets`, `rewards` or `margins`."""
    metrics = run.get("metrics") or {}
    file = "margins.jsonl" if method is DPO else "eval_rows.jsonl"
    return line_of(read_lines(folder / file), metrics.get("kept_step", metrics.get("steps")))


def _compare(theirs: dict, ours: dict, method: MethodFacts, name: str, say: Say) -> dict[str, Any] | None:
    kind, greater = "rewards" if method.greater_is_better else "losses", method.greater_is_better
    if method is DPO:
        kind, greater = "margins", True
    headlines = (
        say("Better than {name}, on the rows that both held out", name=name),
        say("Worse than {name}, on the rows that both held out", name=name),
        say("Not told apart from {name}: the difference may be chance", name=name),
    )
    return judge_rows(theirs.get(kind), ours.get(kind), theirs.get("targets"), greater, headlines, say)


def _of_metric(method: MethodFacts, name: str, other: dict, run: dict, say: Say) -> str:
    values = [number((one.get("metrics") or {}).get(method.metric)) for one in (other, run)]
    there, here = ("?" if value is None else f"{value:.4f}" for value in values)
    return say(
        "{title}: {there} in {name}, {here} here.", title=say(method.title.capitalize()), there=there, name=name, here=here
    )
