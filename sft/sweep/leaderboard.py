"""The table of a sweep: every job as a row, ranked by its method's metric, and what may honestly be read from it."""

import csv
import io
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, variance
from typing import Any, TextIO

from sft.config.compose import where_it_looked
from sft.config.keys import flatten
from sft.config.method import SFT, MethodFacts, facts_of
from sft.config.schema import GROUPS, Settings
from sft.errors import refuse
from sft.programs import as_called
from sft.report.texts import Say, speaker
from sft.sanitize import shown
from sft.storage.jsonio import number
from sft.sweep.index import FINISHED, Job, SweepIndex, find_sweeps, load_index, read_run, readable_index

log = logging.getLogger(__name__)

# Two-sided 95 % points of Student's t by degrees of freedom: a spread measured on three runs is itself uncertain.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)

SEEDS = ("seed",)

ALL_SEEDS = (*SEEDS, "dataset.seed")
"""That of which rows are held out among them."""


@dataclass
class TableRow:
    """One job with what its run folder says."""

    job: Job
    values: dict[str, Any]
    """The varying settings, numbers as numbers."""
    rank: int | None = None
    metric: float | None = None
    """What its method ranks runs by, of the weights that were kept; only of finished jobs."""
    start: float | None = None
    """The same before training."""
    step: int | None = None
    """Step of the weights that were kept."""
    tokens: int | None = None
    """Non-padding tokens trained on."""
    tokens_per_second: float | None = None
    seconds: float | None = None
    """Wall time of the last attempt."""
    gpu_hours: float | None = None
    """Time of all attempts on one GPU; None without a GPU."""
    memory_gib: float | None = None
    held_out: str | None = None
    """Hash of the held-out rows."""
    note: str = ""


@dataclass
class Leaderboard:
    """A sweep's rows, the best first, and the remarks on them."""

    index: SweepIndex
    keys: list[str]
    """The settings that vary, as columns."""
    rows: list[TableRow]
    method: MethodFacts = SFT
    """How the jobs were trained, and so what ranks them."""
    by_change: bool = False
    """The jobs were measured on other held-out rows each, so that they are ranked by the change from before training."""
    seeds_apart: bool = False
    """Settings have several seeds, but each seed has held-out rows of its own."""
    noise: float | None = None
    """Standard deviation of `value` between runs that differ in their seed alone; None without such runs."""
    noise_factor: float = 0.0
    """Times how much `noise` the mean of one run is known, with 95 % confidence."""
    sentences: list[list[tuple[str, dict[str, Any]]]] = field(default_factory=list)
    """What has to be known before a row is called better than another: of each remark the sentences, with their values."""
    next_commands: list[str] = field(default_factory=list)
    """Commands that would settle what is open."""

    @property
    def remarks(self) -> list[str]:
        """The remarks in English."""
        return self.remarks_in(speaker("en"))

    def remarks_in(self, say: Say) -> list[str]:
        """The remarks in the language of `say`."""
        return [say(" ").join(say(sentence, **values) for sentence, values in remark) for remark in self.sentences]

    def value(self, row: TableRow) -> float:
        """What ranks a row: its metric, or how far that changed."""
        return row.metric - row.start if self.by_change else row.metric

    def cost(self, row: TableRow) -> float:
        """The same, the less the better."""
        return -self.value(row) if self.method.greater_is_better else self.value(row)

    @property
    def best(self) -> TableRow | None:
        """The finished row that ranks first."""
        return next((row for row in self.rows if row.rank == 1), None)


def read_leaderboard(folder: Path) -> Leaderboard:
    """The table of the sweep in `folder`. Raises Refusal if there is no sweep."""
    index = load_index(folder)
    if index is None:
        raise refuse(f"run={folder}", "The folder holds no sweep (no sweep.json).", "run=<a folder in outputs/sweeps>")
    keys = varying_keys(index.jobs)
    runs = [read_run(index.folder / job.folder) for job in index.jobs]
    method = next((facts_of(run) for run in runs if run), SFT)
    rows = [_read_row(run, job, keys, method) for run, job in zip(runs, index.jobs, strict=True)]
    board = Leaderboard(index, keys, rows, method)
    ranked = [row for row in rows if row.metric is not None]
    board.by_change = len({row.held_out for row in ranked}) > 1 and all(row.start is not None for row in ranked)
    rows.sort(key=lambda row: (row.metric is None, 0.0 if row.metric is None else board.cost(row), row.job.number))
    for rank, row in enumerate((row for row in rows if row.metric is not None), 1):
        row.rank = rank
    remark(board)
    return board


def best_run(sweep: Path | str | None = None) -> Path:
    """Run folder of the job that ranks first; of the newest sweep in outputs/sweeps if none is named.

    Raises Refusal if there is no sweep, or none of its jobs finished with what ranks it.
    """
    if sweep is None:
        sweeps = [sweep for sweep in find_sweeps(Path("outputs/sweeps")) if readable_index(sweep)]
        if not sweeps:
            raise refuse("run=best", "There is no sweep in outputs/sweeps.", "run=<run folder>   for a single run")
        sweep = sweeps[0]
    board = read_leaderboard(Path(sweep))
    if board.best is None:
        fix = f"python scripts/leaderboard.py {shlex.quote(f'run={sweep}')}"
        raise refuse(f"run={sweep}", f"None of its jobs finished with a {board.method.title}.", fix)
    return board.index.folder / board.best.job.folder


# ------------------------------------------------------------------------------------------------------ the rows


def varying_keys(jobs: list[Job]) -> list[str]:
    """The override keys whose value is not the same in all jobs, in the order they were first typed.

    What every job takes from another setting by the same words, as in `lora.lora_alpha=${lora.r}`, varies only with that.
    """
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    typed = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]
    return [key for key in typed if len({str(_value(job, key)) for job in jobs}) > 1]


def _value(job: Job, key: str) -> Any:
    """A job's value of a setting; of a group the option that was chosen."""
    if key in job.overrides and "${" not in job.overrides[key]:
        return _plain(job.overrides[key])
    if key in GROUPS:
        return "default"
    return job.settings.get(key, flatten(_defaults()).get(key))


def _defaults() -> dict[str, Any]:
    from sft.storage.jsonio import jsonable

    return jsonable(Settings())


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read_row(run: dict[str, Any], job: Job, keys: list[str], method: MethodFacts) -> TableRow:
    metrics, data = run.get("metrics", {}), run.get("data", {})
    row = TableRow(job, {key: _value(job, key) for key in keys}, note=job.reason or "")
    if run.get("config_hash") != job.config_hash:
        return row
    row.seconds = number(run.get("seconds", {}).get("total"))
    row.tokens, row.tokens_per_second = metrics.get("tokens"), number(metrics.get("tokens_per_second"))
    row.memory_gib, row.held_out = number(metrics.get("memory_gib")), data.get("held_out_hash")
    row.start, row.step = number(metrics.get(f"{method.metric}_start")), metrics.get("kept_step")
    if run.get("hardware", {}).get("gpu"):
        row.gpu_hours = round(max(job.seconds, row.seconds or 0.0) / 3600, 4)
    if job.status == FINISHED:
        own = facts_of(run)
        if own.metric != method.metric:  # two scales have no common rank
            row.note = row.note or f"not ranked: {own.name} is measured by {own.metric}"
            return row
        row.metric = number(metrics.get(method.metric))
        if row.metric is not None and row.start is not None and method.is_worse(row.metric, row.start):
            row.note = row.note or "worse than before training"
    return row


# --------------------------------------------------------------------------------------------------- the remarks


def remark(board: Leaderboard) -> None:
    """Add what limits the comparison: noise, unequal budgets, other held-out rows, a best value on the edge of the grid."""
    ranked = [row for row in board.rows if row.rank]
    if not ranked:
        if board.rows and all(row.job.status == FINISHED for row in board.rows):
            text = "Nothing was held out, so there is no {noun} to rank by (dataset.eval_fraction=0.1)."
            board.sentences.append([(text, {"noun": board.method.noun})])
        return
    for check in (_check_rows, _check_budget, _check_noise, _check_edges):
        check(board, ranked)


def _check_rows(board: Leaderboard, ranked: list[TableRow]) -> None:
    hashes = {row.held_out for row in ranked}
    if len(hashes) < 2:
        return
    text = "The jobs were measured on {count} different sets of held-out rows, so their values cannot be compared directly."
    remark = [(text, {"count": len(hashes)})]
    if board.by_change:
        remark.append(("They are ranked by the change from before training.", {}))
    if "seed" in board.keys and not any("dataset" in key for key in board.keys):
        remark.append(("The seed chooses the rows; dataset.seed=3407 gives every job the same ones.", {}))
    board.sentences.append(remark)


def _check_budget(board: Leaderboard, ranked: list[TableRow]) -> None:
    tokens = [row.tokens for row in ranked if row.tokens]
    if tokens and max(tokens) > 1.02 * min(tokens):
        text = (
            "The jobs did not train on equally many tokens ({least} to {most}): part of a difference is the longer training, "
            "not the setting."
        )
        board.sentences.append([(text, {"least": f"{min(tokens):,}", "most": f"{max(tokens):,}"})])


def setting_groups(board: Leaderboard, rows: list[TableRow]) -> list[list[TableRow]]:
    """Ranked rows that differ in their seed alone, together; the best first."""
    groups: dict[str, list[TableRow]] = {}
    seeds = ALL_SEEDS if board.by_change else SEEDS
    for row in rows:
        rows_of = [] if board.by_change else [row.held_out]
        key = json.dumps([str(row.values[k]) for k in board.keys if k not in seeds] + rows_of)
        groups.setdefault(key, []).append(row)
    return sorted(groups.values(), key=lambda group: mean(board.cost(row) for row in group))


def _check_noise(board: Leaderboard, ranked: list[TableRow]) -> None:
    groups = setting_groups(board, ranked)
    repeated = [group for group in groups if len(group) > 1]
    if not repeated:
        settings = {json.dumps([str(row.values[k]) for k in board.keys if k not in ALL_SEEDS]) for row in ranked}
        board.seeds_apart = len(settings) < len(ranked)
        if board.seeds_apart:
            text = (
                "Settings were run under several seeds, each with held-out rows of its own: these values do not tell what is "
                "chance."
            )
            board.sentences.append([(text, {})])
        elif len(ranked) > 1:
            text = "No setting was run under several seeds, so it is not known how much of a difference is chance."
            board.sentences.append([(text, {}), ("Repeat the best one:", {})])
            board.next_commands.append(
                _command(board, ranked[0], {"seed": _other_seeds(ranked[0]), "dataset.seed": _rows_seed(ranked[0])})
            )
        return
    freedom = sum(len(group) - 1 for group in repeated)
    board.noise = math.sqrt(sum((len(g) - 1) * variance([board.value(row) for row in g]) for g in repeated) / freedom)
    factor = board.noise_factor = T95[freedom - 1] if freedom <= len(T95) else 2.0
    best, within = groups[0], 0
    for group in groups[1:]:
        gap = mean(board.cost(r) for r in group) - mean(board.cost(r) for r in best)
        if gap <= factor * board.noise * math.sqrt(1 / len(group) + 1 / len(best)):
            within += len(group)
            for row in group:
                row.note = row.note or "within noise of the best"
    text = "Runs that differ in the seed alone differ by {noise} (standard deviation, {count} runs)."
    remark = [(text, {"noise": f"{board.noise:.4f}", "count": freedom + len(repeated)})]
    if len(groups) == 1:
        remark.append(("These are all of them: what is seen here is chance.", {}))
    elif within:
        text = "{count} rows lie within this noise of the best setting: they are not known to be worse."
        remark.append((text, {"count": within}))
    else:
        remark.append(("The best setting is ahead of all others by more than this noise.", {}))
    board.sentences.append(remark)


def _other_seeds(row: TableRow) -> str:
    used = row.values.get("seed", row.job.settings.get("seed", Settings().seed))
    return ",".join(map(str, [used, *[s for s in (1, 2, 3) if s != used][:2]]))


def _rows_seed(row: TableRow) -> str:
    return str(row.job.settings.get("dataset.seed") or row.job.settings.get("seed", Settings().seed))


def _check_edges(board: Leaderboard, ranked: list[TableRow]) -> None:
    """A best value on the edge of what was tried: the next values lie beyond it, as far apart as the last two."""
    best = setting_groups(board, ranked)[0][0]
    for key in board.keys:
        tried = sorted({row.values[key] for row in ranked if isinstance(row.values[key], int | float)})
        if key in (*SEEDS, "dataset.seed") or len(tried) < 2 or best.values[key] not in (tried[0], tried[-1]):
            continue
        top = best.values[key] == tried[-1]
        steps = _beyond(tried if top else tried[::-1])
        if not steps:
            continue
        text = (
            "The best {key}, {value}, is the largest one tried: a better one may lie beyond. Try:"
            if top
            else "The best {key}, {value}, is the smallest one tried: a better one may lie beyond. Try:"
        )
        board.sentences.append([(text, {"key": key, "value": _text(best.values[key])})])
        board.next_commands.append(_command(board, best, {key: ",".join(map(_text, steps))}))


def _beyond(tried: list[float]) -> list[float]:
    """Two values beyond the last one: by the last ratio if all are above 0, else by the last difference."""
    before, last = tried[-2:]
    if before > 0 and last > 0:
        values = [last * (last / before), last * (last / before) ** 2]
    else:
        values = [last + (last - before), last + 2 * (last - before)]
    if all(isinstance(value, int) for value in tried):
        values = [round(value) for value in values]
    else:
        values = [float(f"{value:.2g}") for value in values]
    return [value for value in dict.fromkeys(values) if value > 0 and value != last]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _command(board: Leaderboard, row: TableRow, changed: dict[str, str]) -> str:
    """The command that runs `row` again with other values, as further jobs of the same sweep."""
    overrides = {**row.job.overrides, **changed}
    flags, places = where_it_looked(board.index.command)
    words = [*flags, *(f"{key}={value}" for key, value in overrides.items()), *places]
    return as_called("python train.py -m ") + shlex.join([*words, f"hydra.sweep.dir={os.path.relpath(board.index.folder)}"])


# ----------------------------------------------------------------------------------------------------- the files


def columns_of(method: MethodFacts) -> list[tuple[str, Callable[[TableRow], Any]]]:
    """The columns of results of a sweep by this method: a name, and what it takes of a row."""
    return [
        ("status", lambda row: row.job.status),
        (method.metric, lambda row: row.metric),
        (f"{method.metric}_start", lambda row: row.start),
        ("kept_step", lambda row: row.step),
        ("tokens", lambda row: row.tokens),
        ("tokens_per_second", lambda row: row.tokens_per_second),
        ("seconds", lambda row: row.seconds),
        ("gpu_hours", lambda row: row.gpu_hours),
        ("memory_gib", lambda row: row.memory_gib),
        ("attempts", lambda row: row.job.attempts),
        ("note", lambda row: row.note),
        ("folder", lambda row: row.job.folder),
        ("config_hash", lambda row: row.job.config_hash),
    ]


def write_csv(board: Leaderboard) -> Path:
    """Write leaderboard.csv, whole or not at all: rank, the varying settings, then the results."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = columns_of(board.method)
    writer.writerow(["rank", *board.keys, *(name for name, _ in columns)])
    for row in board.rows:
        cells = [row.rank, *(row.values[key] for key in board.keys), *(get(row) for _, get in columns)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    target = board.index.folder / "leaderboard.csv"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text.getvalue(), encoding="utf-8", errors="replace")  # half a character
    os.replace(temporary, target)
    return target


def as_json(board: Leaderboard) -> dict[str, Any]:
    """The table as plain values: of each row the rank, the varying settings, and the columns of leaderboard.csv."""
    columns = columns_of(board.method)
    rows = [{"rank": row.rank, "settings": row.values, **{name: get(row) for name, get in columns}} for row in board.rows]
    return {
        "sweep": os.path.relpath(board.index.folder),
        "metric": board.method.metric,
        "greater_is_better": board.method.greater_is_better,
        "best": os.path.relpath(board.index.folder / board.best.job.folder) if board.best else None,
        "noise": board.noise,
        "rows": rows,
        "remarks": board.remarks,
        "next_commands": board.next_commands,
    }


def show(folder: Path, file: TextIO | None = None) -> None:
    """Print the table and the remarks to `file` (stderr if none), as wide as the terminal. Raises Refusal without a sweep."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    board = read_leaderboard(folder)
    file = file or sys.stderr
    console = Console(file=file, highlight=False, soft_wrap=True, width=None if file.isatty() else 160)
    table = Table(box=None, header_style="bold", pad_edge=False)
    held_out = board.method.title if board.method.greater_is_better else "held-out"
    change = ("change",) if board.by_change else ()
    for title in ("#", *(key.rsplit(".", 1)[-1] for key in board.keys), held_out, *change, "tokens/s", "time", "status"):
        table.add_column(Text(shown(title)), justify="left" if title == "status" else "right", overflow="fold")
    for row in board.rows:
        value = "" if row.metric is None else f"{row.metric:.4f}"
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        time = "" if row.seconds is None else f"{row.seconds:,.0f} s"
        status = row.job.status if not row.note else row.note if row.job.status == FINISHED else f"{row.job.status}: {row.note}"
        style = "bold green" if row.rank == 1 else "" if row.rank else "dim"
        change = [f"{board.value(row):+.4f}" if row.rank else ""] if board.by_change else []
        cells = [str(row.rank or ""), *(_text(row.values[key]) for key in board.keys), value, *change, speed, time, status]
        table.add_row(*(Text(shown(cell)) for cell in cells), style=style)  # a Text, because brackets are no markup here
    console.print(table)
    commands = iter(board.next_commands)
    for text in board.remarks:
        console.print(shown(f"note: {text}"), markup=False)
        if text.endswith(":") and (command := next(commands, None)):
            console.print(shown(f"  {command}"), markup=False)
