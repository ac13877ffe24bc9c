"""Prompts for completions of the model's own: a row up to its last answer, which rewards may compare with."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sft.config.keys import typed
from sft.config.schema import DatasetSettings, Overlong, Settings, Shape
from sft.data.audit import SplitStats, holds_targets, room_for
from sft.data.cells import as_text, read_raw_turns
from sft.data.columns import MEANINGS, SHAPES, WEIGHT_COLUMNS, column_names, guess_shape, likeliest, row_is_read, row_to_turns
from sft.data.templates import Rendered, render_row
from sft.errors import Refusal, refuse

STAND_IN = "x"
"""Stands where the model is to answer, so that the template writes what comes before an answer."""

NO_COLUMN = "\ue000answer"
"""The column of answers of rows that have none."""

COUNTED = ("weightless_rows", "empty_prompts", "references")


def find_prompts(rows: Sequence[dict], data: DatasetSettings, source: str) -> tuple[Shape, DatasetSettings]:
    """(the shape of the rows, the settings by which they are read): the answer's column is the shape's own, else
    `dataset.columns.answer`, else one that no row has. Raises Refusal for rows that have no prompt.
    """
    names, columns = column_names(rows), data.columns
    shape = _find_shape(rows, names, data)
    if columns.answer not in (None, "answer") and columns.answer not in names:
        match = likeliest("output", columns.answer, names)
        why = f"{source} has no column {columns.answer!r}. It has: {', '.join(sorted(names))}."
        fix = typed("dataset.columns.answer", match) if match else "dataset.columns.answer=answer"
        raise refuse(f"dataset.columns.answer={columns.answer}", why, fix)
    role = SHAPES[shape].answer
    own = getattr(columns, role)
    if SHAPES[shape].turns or own in names or own not in (None, getattr(DatasetSettings().columns, role)):
        return shape, data  # one that was named and is missing is refused with the other columns
    other = columns.answer if columns.answer in names else NO_COLUMN
    return shape, replace(data, columns=replace(columns, **{role: other}))


def _find_shape(rows: Sequence[dict], names: set[str], data: DatasetSettings) -> Shape:
    """The shape that `dataset.shape` names, or the first with all its columns, or else with that of the question."""
    if data.shape != Shape.auto:
        return data.shape
    layouts = {shape: layout for shape, layout in SHAPES.items() if shape != Shape.text}
    for needed in (len, lambda roles: 1):
        for shape, layout in layouts.items():
            wanted = layout.needed[: needed(layout.needed)]
            if all(any(getattr(data.columns, role) in names for role in roles) for roles in wanted):
                return shape
    fix = guess_shape(rows, names, data)
    if not fix or "dataset.shape=text" in fix:
        match = likeliest("instruction", "instruction", names - {data.columns.answer})
        fix = typed("dataset.columns.instruction", match) if match else "dataset.columns.instruction=<column>"
    raise refuse("dataset.shape=auto", f"The columns {', '.join(sorted(names))} fit no shape with a prompt.", fix)


def has_answers(data: DatasetSettings, shape: Shape) -> bool:
    """Whether the rows that `find_prompts` gives these settings for have a column of answers."""
    return getattr(data.columns, SHAPES[shape].answer) != NO_COLUMN


def without_reasoning(meant: dict[str, str]) -> dict[str, str]:
    """Of columns that carry meaning those that stand before the answer: what was thought is no part of a prompt."""
    return {name: fix for name, fix in meant.items() if name.lower() not in MEANINGS["reasoning"]}


def render_prompt(row: dict, data: DatasetSettings, shape: Shape, template: str, tokenizer: Any) -> list[Rendered]:
    """The row with its last answer alone marked, or a stand-in where the model's own is to stand; the reference is the data's.

    A conversation that ends with another's turn is a prompt as a whole. A row of weight 0 has nothing marked.
    """
    row = row if data.columns.reasoning is None else row | {data.columns.reasoning: None}
    last = row_to_turns(row, data, shape)[-1]
    answered = last.role == "assistant" and bool(last.content.strip() or last.extra.get("tool_calls"))
    rendered = None
    if answered:
        try:
            rendered = render_row(row, data, shape, template, tokenizer)
        except Refusal:  # of the answer itself, perhaps, which is no part of the prompt; else it is raised below
            rendered = None
    if rendered is not None and (rendered.spans or row_is_read(row, data)):
        reference = rendered.reference
    else:
        calls = last.extra.get("tool_calls")
        reference = (last.content or json.dumps(calls, ensure_ascii=False)) if answered else ""
        open_turn = last.role != "assistant"
        rendered = render_row(_with_stand_in(row, data, shape, open_turn), data, shape, template, tokenizer)
        if open_turn and data.columns.answer:
            reference = as_text(row.get(data.columns.answer))
    notes = [note for note in rendered.notes if note not in ("reasoning", "weight")]
    return [replace(rendered, spans=rendered.spans[-1:], reference=reference, notes=notes)]


def _with_stand_in(row: dict, data: DatasetSettings, shape: Shape, open_turn: bool) -> dict:
    """The row with the stand-in as its last answer: a turn more where it ends with another's."""
    column = getattr(data.columns, SHAPES[shape].answer)
    if not SHAPES[shape].turns:
        return row | {column: STAND_IN}
    turns = read_raw_turns(row[column])
    answer = {"role": "assistant", "content": STAND_IN}
    if not open_turn and "output" in turns[-1] and "role" not in turns[-1]:  # pairs of input and output
        answer = {**turns[-1], "output": STAND_IN}
    kept = {name: value for name, value in row.items() if name not in WEIGHT_COLUMNS or not isinstance(value, list)}
    return kept | {column: [*(turns if open_turn else turns[:-1]), answer]}


def cut_to_prompts(entries: Iterator[dict], table: Sequence[dict], counts: dict[str, int]) -> Iterator[dict]:
    """Entries with the tokens before the last answer alone, and the raw row as JSON for the rewards. Rows of weight 0 and those
    without any token before the answer are left out.
    """
    for key in COUNTED:
        counts.setdefault(key, 0)
    for entry in entries:
        whole = "not counted" not in entry["notes"]
        if whole and not holds_targets(entry["labels"]):
            counts["weightless_rows"] += 1
            continue
        if not entry["prompt_length"]:
            counts["empty_prompts"] += 1
            continue
        counts["references"] += bool(entry["reference"].strip())
        ids = entry["input_ids"][: entry["prompt_length"]]
        raw = json.dumps(table[entry["row"] - 1], ensure_ascii=False, default=str)
        yield entry | {"input_ids": ids, "labels": [], "columns": raw}


def fit_prompts(entries: list[dict], settings: Settings, counts: dict[str, int]) -> list[dict]:
    """The entries that leave room for a completion; under `dataset.overlong=drop` the others are counted."""
    room = settings.model.max_seq_length - settings.method.max_completion_length
    kept = [entry for entry in entries if len(entry["input_ids"]) <= room]
    if len(kept) < len(entries) and settings.dataset.overlong == Overlong.drop:
        counts["dropped_rows"] = counts.get("dropped_rows", 0) + len(entries) - len(kept)
    return kept


def too_long(longer: list[str], longest: int, whole: bool, settings: Settings) -> Refusal:
    """`longest` prompt in tokens, known if the `whole` of each was tokenised."""
    limit, room = settings.model.max_seq_length, settings.method.max_completion_length
    what = f"model.max_seq_length={limit} method.max_completion_length={room}"
    why = f"{' and '.join(longer)} have a prompt that leaves no room for the completion "
    why += f"(the longest has {longest if whole else f'more than {longest}'} tokens)."
    fix = f"{room_for(longest + room)}\n" if whole else ""
    fix += f"method.max_completion_length={limit - longest}\n" if whole and longest < limit else ""
    return refuse(what, why, f"{fix}dataset.overlong=drop   leaves them out")


def refuse_no_prompts(splits: dict[str, SplitStats], counts: dict[str, int], settings: Settings) -> None:
    """Refuse a split in which no prompt is left, with the reason that most of its rows went for."""
    for name, split in splits.items():
        if split.digests:
            continue
        rows = "None of the rows to train on" if name == "train" else "None of the held-out rows"
        room = settings.method.max_completion_length
        if counts.get("dropped_rows"):
            what = f"dataset.overlong=drop model.max_seq_length={settings.model.max_seq_length}"
            fix = "raise model.max_seq_length" if split.notes["not counted"] else room_for(max(split.lengths) + room)
            raise refuse(what, f"{rows} leaves room for method.max_completion_length={room} tokens.", fix)
        why = f"{rows} has a prompt: all have the weight 0, or no token before the answer."
        fix = "dataset.columns.instruction=<the column with the questions>"
        if name == "eval":
            fix += "\ndataset.eval_fraction=0   holds none out"
        raise refuse("dataset", why, fix)


def prompt_warnings(counts: dict[str, int], facts: dict[str, Any], settings: Settings) -> list[str]:
    """What a reader has to know of the prompts; `counts` are those of `cut_to_prompts` and `fit_prompts`."""
    limit, room = settings.model.max_seq_length, settings.method.max_completion_length
    texts = {
        "weightless_rows": "rows have the weight 0 and were left out.",
        "empty_prompts": "rows have no token before their answer and were left out.",
        "bad_rows": "rows cannot be read and were left out (dataset.skip_bad_rows=true).",
        "rows_with_two_bos": "rows begin with two BOS tokens: the template or the data writes one too many.",
        "dropped_rows": f"rows were left out: their prompt and method.max_completion_length={room} have no room in "
        f"model.max_seq_length={limit}.",
    }
    found = [f"{counts[key]} {text}" for key, text in texts.items() if counts.get(key)]
    if counts.get("rows_with_boundary_merge") and settings.dataset.template not in ("auto", "chat", "alpaca"):
        found.append(
            f"In {counts['rows_with_boundary_merge']} rows a token joins the prompt to the answer, and the prompt ends before "
            "it; put a line break before the answer, not a space."
        )
    duplicates = facts["duplicates"]
    if duplicates["held_out"]:
        held_out, trained = duplicates["rows"][0]
        found.append(
            f"{duplicates['held_out']} held-out prompts are trained on as well (row {held_out} is that of row {trained}): "
            "the held-out reward looks better than it is. Remove the copies from the data."
        )
    return found


def take_prompt_counts(counts: dict[str, int]) -> dict[str, int]:
    """The counts of `cut_to_prompts`, taken out of all others."""
    return {key: counts.pop(key, 0) for key in COUNTED}
