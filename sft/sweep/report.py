"""A sweep's report.html: the table, its remarks, all curves on one plot, what the settings did, and the completions beside
each other. Like a run's report it is one file that asks the network for nothing.
"""

import functools
import os
from pathlib import Path

from sft.report.page import render
from sft.report.samples import marks_of
from sft.report.texts import Say, speaker
from sft.storage.jsonio import number, read_lines
from sft.sweep.charts import draw_charts, stamp
from sft.sweep.index import FINISHED
from sft.sweep.leaderboard import Leaderboard

MAX_RUNS = 60
"""Runs whose completions are shown; with more the page would be slow to open."""

MAX_COMPLETION = 1200
"""Characters shown of a completion."""


def write_sweep_report(board: Leaderboard) -> Path:
    """Write report.html into the sweep's folder, whole or not at all, and return its path."""
    folder = board.index.folder
    lang = language_of(board)
    say = speaker(lang)
    page = render(
        {
            "lang": lang,
            "say": say,
            "name": folder.resolve().name,
            "board": board,
            "index": board.index,
            "counts": _counts(board),
            "seconds": sum(row.job.seconds for row in board.rows),
            "gpu_hours": sum(row.gpu_hours or 0.0 for row in board.rows) or None,
            "charts": draw_charts(board, say),
            "prompts": gather_completions(board),
            "remarks": pair_commands(board, say),
        },
        "sweep.html.j2",
    )
    target = folder / "report.html"
    temporary = folder / f".report.html.{os.getpid()}"
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(temporary, target)
    return target


def language_of(board: Leaderboard) -> str:
    """`report.lang` of the first job."""
    jobs = board.index.jobs
    return "zh" if jobs and jobs[0].settings.get("report.lang") == "zh" else "en"


def pair_commands(board: Leaderboard, say: Say = str) -> list[tuple[str, str | None]]:
    """Each remark with the command it announces."""
    commands, shown = iter(board.next_commands), board.remarks if say is str else board.remarks_in(say)
    announced = [next(commands, None) if text.endswith(":") else None for text in board.remarks]
    return [*zip(shown, announced, strict=True)]


def _counts(board: Leaderboard) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in board.rows:
        counts[row.job.status] = counts.get(row.job.status, 0) + 1
    return counts


# ---------------------------------------------------------------------------------------------------- the completions


def gather_completions(board: Leaderboard) -> list[dict]:
    """For each prompt the last completion of every run, the best run first; with the one before training and the reference."""
    prompts: dict[str, dict] = {}
    for row in board.rows[:MAX_RUNS]:
        if row.job.status != FINISHED:
            continue
        lines = _completions(stamp(board.index.folder / row.job.folder / "samples.jsonl"))
        last = max((line["step"] for line in lines if number(line.get("step")) is not None), default=0)
        for line in lines:
            entry = prompts.setdefault(str(line.get("prompt")), {"first": line, "before": None, "completions": []})
            if line.get("step") == 0:
                entry["before"] = {**line, "marks": marks_of(line)}
            if line.get("step") == last and last:
                text = str(line.get("completion") or "")
                shown = text if len(text) <= MAX_COMPLETION else text[:MAX_COMPLETION] + " …"
                found = {"row": row, "completion": shown, "finish": line.get("finish"), "marks": marks_of(line)}
                entry["completions"].append(found)
    return [entry for entry in prompts.values() if entry["completions"]]


@functools.lru_cache(maxsize=2000)
def _completions(stamp: tuple[str, int, int]) -> list[dict]:
    return read_lines(Path(stamp[0]))
