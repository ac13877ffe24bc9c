"""Preferences: two answers to one prompt, each rendered as a row of its own; what the pairs of a data set are like."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sft.config.keys import typed
from sft.config.schema import DatasetSettings, Shape
from sft.data.audit import SplitStats
from sft.data.cells import Turn, holds_turns
from sft.data.columns import check_columns, column_names, likeliest, row_to_turns
from sft.data.shared_prompt import shared_length
from sft.data.templates import Rendered, choose_template, render_row
from sft.data.tokenize import IGNORED
from sft.errors import Problem, Refusal, refuse

COUNTED = ("pairs", "equal_pairs", "chosen_longer")

LONGER = 0.75
"""Share of pairs whose chosen answer is the longer one from which on the model is trained on length."""

SHOWN = 5
"""Rows that a warning names."""


def find_form(rows: Sequence[dict], data: DatasetSettings, source: str) -> tuple[Shape, DatasetSettings, DatasetSettings]:
    """(the shape of a row with one of its answers, the settings by which the chosen one is read, and the rejected one).

    A prompt has a column of its own (`prompt`, or `instruction` and perhaps `input`), or both answers are whole conversations
    with the same beginning. Raises Refusal, all at once, for columns that are missing.
    """
    names, columns = column_names(rows), data.columns
    problems = []
    for role in ("chosen", "rejected"):
        column = getattr(columns, role)
        if column not in names:
            match = likeliest(role, column or role, names)
            why = f"{source} has no column {column!r}, and method=dpo needs two answers. It has: {', '.join(sorted(names))}."
            fix = typed(f"dataset.columns.{role}", match) if match else f"dataset.columns.{role}=<column>   or method=sft"
            problems.append(Problem(f"dataset.columns.{role}={column}", why, fix))
    if problems:
        raise Refusal(problems)
    conversations = len(rows) and all(_is_whole(rows[0].get(getattr(columns, role))) for role in ("chosen", "rejected"))
    if conversations:
        shape, role = Shape.messages, "messages"
    elif columns.prompt in names:
        shape, role = Shape.prompt_completion, "completion"
    elif columns.instruction in names:
        shape, role = Shape.instruction, "output"
    else:
        match = likeliest("instruction", "prompt", names - {columns.chosen, columns.rejected})
        why = f"{source} has no column for the prompt. It has: {', '.join(sorted(names))}."
        fix = typed("dataset.columns.prompt", match) if match else "dataset.columns.prompt=<column>"
        raise refuse(f"dataset.columns.prompt={columns.prompt}", why, fix)
    read = [
        replace(data, shape=shape, columns=replace(columns, **{role: getattr(columns, one)})) for one in ("chosen", "rejected")
    ]
    for one in read:
        check_columns(rows, one, shape, source)
    return shape, read[0], read[1]


def _is_whole(value: Any) -> bool:
    """Whether an answer is a whole conversation: turns that begin before the assistant."""
    return holds_turns(value) and str(value[0].get("role") or value[0].get("from")).lower() not in ("assistant", "gpt")


def render_pair(row: dict, chosen: DatasetSettings, rejected: DatasetSettings, shape: Shape, tokenizer: Any) -> list[Rendered]:
    """The row with its chosen answer and with its rejected one; of each the last answer is trained on.

    Raises Refusal where the two do not answer the same prompt.
    """
    if shape == Shape.messages:
        prompts = [row_to_turns(row, data, shape)[:-1] for data in (chosen, rejected)]
        if _words(prompts[0]) != _words(prompts[1]):
            fix = "give both the same turns before the last one, or a column prompt"
            raise refuse("", "The conversations of the two answers begin differently.", fix)
    template = choose_template(chosen, shape, tokenizer)
    both = [render_row(row, data, shape, template, tokenizer) for data in (chosen, rejected)]
    return [replace(one, spans=one.spans[-1:]) for one in both]


def _words(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


def pair_up(entries: Iterator[dict], counts: dict[str, int]) -> Iterator[dict]:
    """One entry for two: that of the chosen answer, with the tokens of the rejected one. Equal answers are left out."""
    for key in COUNTED:
        counts.setdefault(key, 0)
    for chosen in entries:
        rejected = next(entries)
        if chosen["input_ids"] == rejected["input_ids"]:
            counts["equal_pairs"] += 1
            continue
        targets = [len(one["labels"]) - one["labels"].count(IGNORED) for one in (chosen, rejected)]
        counts["chosen_longer"] += targets[0] > targets[1]
        counts["pairs"] += 1
        pair = chosen | {"rejected_ids": rejected["input_ids"], "rejected_labels": rejected["labels"]}
        yield pair | {"shared_length": shared_length(pair), "notes": chosen["notes"] + rejected["notes"]}


def take_pair_counts(counts: dict[str, int]) -> dict[str, int]:
    """The counts of `pair_up`, taken out of all others."""
    return {key: counts.pop(key) for key in COUNTED}


def pair_warnings(counts: dict[str, int]) -> list[str]:
    """What a reader has to know of the pairs before they are trained on."""
    found = []
    if counts["equal_pairs"]:
        found.append(f"{counts['equal_pairs']} pairs have two equal answers and were left out.")
    share = counts["chosen_longer"] / max(1, counts["pairs"])
    if share > LONGER:
        found.append(f"In {share:.0%} of the pairs the chosen answer is the longer one: the model would learn length.")
    return found


def compare_pairs(train: SplitStats, held_out: SplitStats | None) -> tuple[dict[str, int], list[str]]:
    """(counts, warnings) of pairs beside the others: of `contradicting` ones the answers change places in another pair of the
    same prompt; the prompt of `held_out_prompts` is one that is trained on as well.
    """
    splits = [(train, ""), *([(held_out, "held-out ")] if held_out else [])]
    placed = {
        digest: f"{kind}row {row}" for split, kind in splits for digest, row in zip(split.digests, split.numbers, strict=True)
    }
    opposed = [
        (f"{kind}row {row}", placed[digest])
        for split, kind in splits
        for digest, row in zip(split.swapped, split.numbers, strict=True)
        if digest in placed
    ]
    trained = dict(zip(train.prompts, train.numbers, strict=True))
    shared = [
        (row, trained[prompt])
        for prompt, row in (zip(held_out.prompts, held_out.numbers, strict=True) if held_out else ())
        if prompt in trained
    ]
    found = []
    if opposed:
        rows = ", ".join(list(dict.fromkeys(" and ".join(sorted(two)) for two in opposed))[:SHOWN])
        found.append(
            f"{len(opposed)} pairs contradict another: the same prompt with the same two answers the other way round ({rows}). "
            "They cancel each other out. Remove one of each two."
        )
    if shared:
        rows = ", ".join(f"row {row} has that of row {other}" for row, other in shared[:SHOWN])
        found.append(
            f"{len(shared)} held-out pairs have a prompt that is trained on as well ({rows}): the held-out numbers look better "
            "than they are. Hold out all pairs of a prompt, in a file of their own."
        )
    return {"contradicting": len(opposed), "held_out_prompts": len(shared)}, found
