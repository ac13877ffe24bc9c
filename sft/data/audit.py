"""What the rows are like and what was lost: lengths, duplicates, faults by the row, warnings."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sft.config.schema import LossOn, Overlong, Reasoning, Settings, Shape
from sft.data.columns import SHAPES
from sft.data.sources import name_rows
from sft.data.tokenize import IGNORED
from sft.errors import Problem, Refusal, refuse

MOST_FAULTS = 1000
"""Kinds of faults of which each is kept with its rows."""

COUNTED = ("truncated_rows", "dropped_rows", "rows_without_labels", "rows_without_eos", "rows_with_boundary_merge",
           "rows_with_two_bos", "rows_with_inner_eos")  # fmt: skip


@dataclass
class SplitStats:
    """What is known of the rows of one split, `train` or `eval`, besides their tokens, which are in a file."""

    lengths: array = field(default_factory=lambda: array("q"))
    """Tokens of each row read, before anything is cut or left out."""
    digests: array = field(default_factory=lambda: array("Q"))
    """A hash of the tokens of each row kept."""
    numbers: array = field(default_factory=lambda: array("q"))
    """Its number in the data."""
    swapped: array = field(default_factory=lambda: array("Q"))
    """The digest of each pair kept, had its answers changed places; empty for rows of one answer."""
    prompts: array = field(default_factory=lambda: array("Q"))
    """A hash of the prompt's tokens of each pair kept."""
    tokens: int = 0
    """Of the rows kept."""
    target_tokens: int = 0
    """How many of these are targets."""
    too_long: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[dict] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    """What was left out of the rows, by `Rendered.notes`."""
    first: dict[str, int] = field(default_factory=dict)
    """The first row with each note."""
    texts: list[str] = field(default_factory=list)
    """Questions and answers of the first rows."""

    @property
    def read(self) -> int:
        """How many rows were tokenised."""
        return len(self.lengths)


def audit(kept: list[dict], counts: dict[str, int], bos: int | None, stop_ids: set[int]) -> None:
    """Count rows that begin with two BOS tokens, rows with an end mark inside an answer, and answers without a question."""
    for e in kept:
        merged, spans = e.pop("boundary_merge"), e.pop("answers")
        marks = {
            "rows_with_boundary_merge": merged,
            "rows_with_two_bos": bos is not None and e["input_ids"][:2] == [bos, bos],
            "rows_with_inner_eos": sum(e["labels"].count(i) for i in stop_ids) > spans,
            "blank": not e["question"].strip(),
        }
        for key, found in marks.items():
            counts[key] = counts.get(key, 0) + found


def find_duplicates(train: SplitStats, held_out: SplitStats | None) -> dict[str, Any]:
    """Rows with the very same tokens: `held_out` ones that are trained on as well, and `train` ones that come again.

    `rows` names the first of the former as [row held out, row trained on], by their numbers in the data.
    """
    import numpy as np

    digests, numbers = np.asarray(train.digests, dtype=np.uint64), np.asarray(train.numbers)
    known, first = np.unique(digests, return_index=True)  # sorted, with the first row of each
    count, pairs = 0, []
    if held_out and len(held_out.digests):
        wanted = np.asarray(held_out.digests, dtype=np.uint64)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        copies = np.flatnonzero(known[at] == wanted)
        count, pairs = len(copies), [[held_out.numbers[i], int(numbers[first[at[i]]])] for i in copies[:5]]
    return {"held_out": count, "train": len(digests) - len(known), "rows": pairs}


class Faults:
    """Rows of one split that cannot be trained on, by what is wrong with them, of `total` rows in all.

    `held_out_in` says where held-out rows are; None for rows to train on.
    """

    def __init__(self, table: Sequence[dict], total: int, held_out_in: str | None = None) -> None:
        self.table, self.total, self.held_out_in, self.count = table, total, held_out_in, 0
        self.rows: dict[Problem, array] = {}

    def add(self, number: int, refusal: Refusal) -> None:
        """Note what is wrong with a row."""
        self.count += 1
        for problem in refusal.problems:
            if problem in self.rows or len(self.rows) < MOST_FAULTS:
                self.rows.setdefault(problem, array("q")).append(number)

    def name(self, *numbers: int) -> str:
        """Rows of the split, for a line of text."""
        return name_rows(self.table, self.held_out_in, *numbers)

    def problems(self) -> list[Problem]:
        """The first faults, each with how many rows have it and the first three."""
        problems = []
        shown = list(self.rows.items())[:5]
        for p, numbers in shown:
            where = self.name(*numbers[:3])
            where += f" ({len(numbers)} of {self.total} rows)" if len(numbers) > 1 else ""
            problems.append(Problem(f"{where}{': ' * bool(p.what)}{p.what}", p.why, p.fix))
        if left := self.count - len({number for _, numbers in shown for number in numbers}):
            more = f" {left} more row{' has' if left == 1 else 's have'} other faults."
            problems[-1] = replace(problems[-1], why=problems[-1].why + more)
        return problems


def refuse_faults(splits: list[Faults], skip: bool) -> None:
    """Raise a Refusal of all rows that cannot be trained on; where rows are skipped, of splits of which that leaves none."""
    whole = [faults for faults in splits if faults.count and faults.count == faults.total]
    problems = [problem for faults in (whole if skip else splits) for problem in faults.problems()]
    if problems:
        if not whole:
            count, total = sum(faults.count for faults in splits), sum(faults.total for faults in splits)
            way = f"dataset.skip_bad_rows=true   leaves {count} of {total} rows out"
            problems[-1] = replace(problems[-1], fix=f"{problems[-1].fix}\n{way}".strip())
        raise Refusal(problems)


def holds_targets(labels: list[int]) -> bool:
    """Whether a token of the row is a target; most rows end with one."""
    return labels[-1:] not in ([], [IGNORED]) or labels.count(IGNORED) < len(labels)


def refuse_nothing_to_learn(splits: dict[str, SplitStats], counts: dict, shape: Shape, settings: Settings) -> None:
    """Refuse a split in which no row is left, with the reason that most of its rows went for."""
    for name, split in splits.items():
        if split.digests:
            continue
        rows = "None of the rows to train on" if name == "train" else "None of the held-out rows"
        limit = f"model.max_seq_length={settings.model.max_seq_length}"
        if counts.get("dropped_rows"):
            what, why, fix = f"dataset.overlong=drop {limit}", "is short enough", _longer(split)
        elif settings.dataset.overlong == Overlong.truncate and counts.get("rows_without_labels"):
            what, why, fix = f"dataset.overlong=truncate {limit}", "has an answer left to learn", _longer(split)
        elif split.notes["reasoning"]:
            what, why = "the chat template", "has an answer that is trained on: it leaves out the reasoning of each"
            other = Reasoning.split if settings.dataset.reasoning == Reasoning.template else Reasoning.keep
            fix = f"dataset.reasoning={other.value}   trains on it\nmodel.chat_template=<the file of a template that keeps it>"
        elif split.notes["weight"]:
            what, why = "the weights of the answers", "has an answer that is trained on: all have the weight 0"
            fix = "give the answers that are to be trained on the weight 1"
        else:
            role = SHAPES[shape].answer
            what = f"dataset.columns.{role}={getattr(settings.dataset.columns, role)}"
            why, fix = "has an answer to learn; all are empty", f"dataset.columns.{role}=<the column with the answers>"
        if name == "eval" and not (settings.dataset.eval_split or settings.dataset.eval_path):
            fix += "\ndataset.eval_fraction=0   holds none out\ndataset.seed=...   holds others out"
        raise refuse(what, f"{rows} {why}.", fix)


def _longer(split: SplitStats) -> str:
    """The hint of a limit that holds the longest row, where all of them were tokenised to their end."""
    return "raise model.max_seq_length" if split.notes["not counted"] else room_for(max(split.lengths))


def room_for(longest: int) -> str:
    """The override of the smallest limit that holds a row of so many tokens."""
    return f"model.max_seq_length={-(-longest // 64) * 64}"


def notes_of(splits: dict[str, SplitStats]) -> dict[str, dict[str, int]]:
    """How often each note was made and the number of the first row with it: {note: {"count", "first"}}.

    It is a row to train on, or else a held-out one, with "held_out" beside it.
    """
    notes = sum((split.notes for split in splits.values()), Counter())
    firsts = {
        note: {"first": split.first[note]} | ({"held_out": True} if name == "eval" else {})
        for name, split in reversed(splits.items())
        for note in split.first
    }
    return {note: {"count": notes[note], **firsts[note]} for note in sorted(notes)}


def data_warnings(counts: dict, blank: int, duplicates: dict[str, Any], notes: dict, settings: Settings) -> list[str]:
    """What a reader has to know of the rows before they are trained on; `notes` as `notes_of` gives them."""
    found = []
    limit = settings.model.max_seq_length
    if counts.get("truncated_rows"):
        found.append(f"{counts['truncated_rows']} rows were cut at {limit} tokens and lost their end mark.")
    if counts.get("dropped_rows"):
        found.append(f"{counts['dropped_rows']} rows over {limit} tokens were left out.")
    if counts.get("bad_rows"):
        found.append(f"{counts['bad_rows']} rows cannot be trained on and were left out (dataset.skip_bad_rows=true).")
    if counts.get("rows_without_labels"):
        reason = "an empty answer" if settings.dataset.overlong != Overlong.truncate else "an empty or cut-off answer"
        reason += ", or none that is trained on," if {"reasoning", "weight"} & notes.keys() else ""
        found.append(f"{counts['rows_without_labels']} rows have {reason} and were left out.")
    if blank:
        found.append(f"{blank} rows have an answer but no question.")
    if counts.get("rows_with_boundary_merge") and settings.dataset.template not in ("auto", "chat", "alpaca"):
        n = counts["rows_with_boundary_merge"]  # a chat template's own space is what generation sees as well
        found.append(f"In {n} rows a token joins the prompt to the answer; put a line break before the answer, not a space.")
    if counts.get("rows_with_two_bos"):
        n = counts["rows_with_two_bos"]
        found.append(f"{n} rows begin with two BOS tokens: the template or the data writes one too many.")
    if counts.get("rows_with_inner_eos") and settings.dataset.loss_on != LossOn.all:
        n = counts["rows_with_inner_eos"]
        found.append(f"{n} rows have an end mark in the middle of an answer: the model would learn to stop there.")
    if duplicates["held_out"]:
        held_out, trained = duplicates["rows"][0]
        found.append(
            f"{duplicates['held_out']} held-out rows are trained on as well, word for word (row {held_out} is row {trained}): "
            "the held-out loss looks better than it is. Remove the copies from the data."
        )
    return found + note_warnings(notes, settings)


def note_warnings(notes: dict[str, dict[str, int]], settings: Settings) -> list[str]:
    """What was left out of rows or changed in them, counted."""
    found = []
    count = {note: one["count"] for note, one in notes.items()}
    if n := count.get("reasoning"):
        found.append(
            f"{n} answers are read and not trained on, because the chat template leaves out their reasoning: without it they "
            "would teach the model to answer at once. dataset.reasoning=split makes one sample of each, with its reasoning."
        )
    if (n := count.get("weight")) and settings.dataset.loss_on == LossOn.all:
        found.append(f"{n} answers have the weight 0 and are trained on all the same, because of dataset.loss_on=all.")
    if n := count.get("tools"):
        found.append(f"{n} rows define tools, and the chat template has no place for them: they are left out.")
    if n := count.get("control tokens"):
        first = f"{'held-out ' * notes['control tokens'].get('held_out', False)}row {notes['control tokens']['first']}"
        found.append(
            f"{n} rows bring control tokens of the model in what is not an answer (first: {first}): "
            "they are read as plain text. dataset.special_tokens_in_text=keep keeps them."
        )
    if keys := _named(count, "key "):
        found.append(f"Keys of turns that are not used, with their number: {keys}.")
    return found


def unused_columns(notes: dict[str, dict[str, int]]) -> str:
    """The columns that are not used, each with the number of rows that hold something in it."""
    return _named({note: one["count"] for note, one in notes.items()}, "column ")


def _named(count: dict[str, int], kind: str) -> str:
    return ", ".join(f"{note.removeprefix(kind)} ({n})" for note, n in count.items() if note.startswith(kind))


def quantiles(lengths: list[int]) -> dict[str, float]:
    import numpy as np

    p50, p90, p99 = (int(q) for q in np.percentile(lengths, [50, 90, 99]))
    mean = round(float(np.mean(lengths)), 1)
    return {"min": min(lengths), "p50": p50, "p90": p90, "p99": p99, "max": max(lengths), "mean": mean}
