"""Rewards tried on the data's own answers and on an empty text, before a weight is loaded."""

import math
import time
from dataclasses import dataclass
from typing import Any

from sft.config.keys import typed
from sft.config.own_code import own_function
from sft.config.reward_names import COMPARING
from sft.config.schema import MethodSettings, Settings
from sft.errors import Problem
from sft.preflight.findings import Found
from sft.rewards import Reward, RewardFault, load_rewards, reward_row

ROWS = 20
"""Rows whose answers are tried."""

SLOW = 0.05
"""Seconds of a call from which on a reward is told to be slow: 64 completions of a step would wait three seconds for it."""

PATIENCE = 20.0
"""Seconds of trying after which a reward that is slow is tried on no further row."""

MEASURED = 5000
"""Reference answers whose tokens are counted."""


@dataclass
class Tried:
    """What a reward gave: for each row that was tried, for its reference answer (None without one) and for an empty text."""

    rows: list[int]
    answers: list[float | None]
    empty: list[float]
    seconds: float
    """Of a call, the quicker of two."""
    changed: tuple[int, str, float, float] | None = None
    """(row, text, first, second) of the first text that got another value the second time."""


def check_rewards(found: Found, settings: Settings) -> None:
    """Try each reward of `method.reward_funcs`: what it gives, whether twice the same, how fast, and whether the data's own
    answers earn what they should.
    """
    entries = list(found.prepared.train.select(range(min(ROWS, len(found.prepared.train)))))
    prompts = found.prepared.facts["prompts"]
    total = found.prepared.facts["rows"]["train"] + found.prepared.facts["rows"].get("eval", 0)
    found.facts["rewards"] = {}
    for reward, name in zip(load_rewards(settings.method), settings.method.reward_funcs, strict=True):
        what = f"method.reward_funcs: {name}"
        compares = _compares(name, settings.method)
        if compares and not prompts["references"]:
            found.refuse("Rewards", [_no_reference(what, name, settings)])
            continue
        try:
            tried = try_reward(reward, entries, found.tokenizer)
        except RewardFault as fault:
            place = reward.place or name
            found.refuse("Rewards", [Problem(what, f"{str(fault)[:1].upper()}{str(fault)[1:]}.", f"mend {place}")])
            continue
        _judge(found, reward, name, tried, compares)
        if compares and prompts["references"] < total:
            text = f"{total - prompts['references']} of {total} rows have no reference answer: {name} gives each of their "
            found.warn("Rewards", text + "completions 0, so that they teach nothing.")
    _check_room(found, settings)


def try_reward(reward: Reward, entries: list[dict], tokenizer: Any) -> Tried:
    """Call a reward twice on the reference answer of each row and on an empty text. Raises RewardFault."""
    tried, began = Tried([], [], [], math.inf), time.monotonic()
    for entry in entries:
        texts = [entry["reference"]] if entry["reference"].strip() else []
        texts.append("")
        rows = [reward_row(entry, "ended", len(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]
        values = []
        for _ in range(2):
            start = time.perf_counter()
            values.append(reward.score(texts, rows))
            tried.seconds = min(tried.seconds, (time.perf_counter() - start) / len(texts))
        for text, first, second in zip(texts, *values, strict=True):
            if first != second and tried.changed is None:
                tried.changed = (entry["row"], text, first, second)
        tried.rows.append(entry["row"])
        tried.answers.append(values[0][0] if len(texts) > 1 else None)
        tried.empty.append(values[0][-1])
        if time.monotonic() - began > PATIENCE:
            break
    return tried


def earned(rewards: list[Reward], entry: dict, tokenizer: Any) -> list[tuple[str, float]]:
    """(name, value) of each reward of a row's reference answer, for people to read. Raises RewardFault."""
    text = entry["reference"]
    rows = [reward_row(entry, "ended", len(tokenizer(text, add_special_tokens=False)["input_ids"]))]
    return [(reward.name, reward.score([text], rows)[0]) for reward in rewards]


def _judge(found: Found, reward: Reward, name: str, tried: Tried, compares: bool) -> None:
    """The lines of what a reward gave."""
    what, part = f"method.reward_funcs: {name}", "Rewards"
    answers = [value for value in tried.answers if value is not None]
    answer = sum(answers) / len(answers) if answers else None
    empty = sum(tried.empty) / len(tried.empty)
    facts = {"weight": reward.weight, "answer": answer, "empty": empty, "milliseconds": round(1000 * tried.seconds, 3)}
    found.facts["rewards"][reward.name] = facts
    if tried.changed:
        row, text, first, second = tried.changed
        why = f"It gave {first:g}, then {second:g} for the same text {text[:60]!r} of row {row}: a resumed run would differ."
        found.refuse(part, [Problem(what, why, f"mend {reward.place or name}: the same text has to get the same value")])
        return
    full = next(((row, value) for row, value in zip(tried.rows, tried.answers, strict=True) if value not in (None, 1)), None)
    if compares and full:
        row, value = full
        reference = _short(found.prepared.train[tried.rows.index(row)]["reference"])
        why = f"It gives the reference answer of row {row}, {reference!r}, {value:g} and not 1: no completion could be right."
        why += " The answer has no number." * (name == "number")
        found.refuse(part, [Problem(what, why, _other_reward(name))])
        return
    given = [*answers, *tried.empty]
    text = f"{reward.name}, weight {reward.weight:g}: "
    text += "" if answer is None else f"reference answers earn {answer:.2f} on the mean, "
    text += f"an empty text {empty:.2f}; {1000 * tried.seconds:.2g} ms a call"
    found.ok(part, text)
    if tried.seconds > SLOW:
        found.warn(part, f"{reward.name} takes {1000 * tried.seconds:.0f} ms a completion: each step waits for it.")
    if not all(0 <= value <= 1 for value in given):
        found.warn(part, f"{reward.name} gives {min(given):g} to {max(given):g}: rewards outside 0 to 1 outweigh others.")
    if own_function(name) and full:
        low = sum(value not in (None, 1) for value in tried.answers)
        found.warn(part, f"{reward.name} gives {low} of {len(answers)} reference answers less than 1, that of row {full[0]} "
                         f"{full[1]:g}. Fine for a matter of style, not for a checker.")  # fmt: skip
    if name in ("regex", "json_schema") and answers and not any(answers):
        found.warn(part, f"{reward.name} gives none of the first {len(answers)} reference answers anything: is it meant so?")


def _compares(name: str, method: MethodSettings) -> bool:
    """Whether a reward compares with the reference answer."""
    return name in COMPARING and not method.reward_options.get(name)


def _no_reference(what: str, name: str, settings: Settings) -> Problem:
    why = f"{name} compares with the reference answer, and no row has one: there is no column for answers, or it is blank."
    others = [one for one in settings.method.reward_funcs if not _compares(one, settings.method)]
    fix = "dataset.columns.answer=<column>   names it"
    if others:
        fix += f"\n{typed('method.reward_funcs', others)} method.reward_weights=[]   leaves it out"
    return Problem(what, why, fix)


def _other_reward(name: str) -> str:
    """The hint for answers that a shipped reward cannot tell: one that can, or another column."""
    fix = "method.reward_funcs=[exact] method.reward_weights=[]\n" if name == "number" else ""
    return f"{fix}dataset.columns.answer=<column>   or   dataset.drop={{<column>: <pattern>}}"


def _check_room(found: Found, settings: Settings) -> None:
    """The tokens of the reference answers, each with its end mark, against `method.max_completion_length`."""
    limit = settings.method.max_completion_length
    train = found.prepared.train
    texts = [text for text in train.select(range(min(MEASURED, len(train))))["reference"] if text.strip()]
    if not texts:
        return
    backend = found.tokenizer.backend_tokenizer
    counts = [len(encoding.ids) + 1 for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    longer = sum(count > limit for count in counts)
    if longer:
        room = -(-max(counts) // 64) * 64
        text = f"{longer} of {len(counts)} reference answers are longer than method.max_completion_length={limit}, the longest "
        text += f"has {max(counts)} tokens: a completion may be cut before its answer."
        fits = f" model.max_seq_length={2 * room}" if room >= settings.model.max_seq_length else ""
        found.warn("Rewards", text, f"method.max_completion_length={room}{fits}")
    else:
        found.ok("Rewards", f"the longest reference answer has {max(counts)} tokens of method.max_completion_length={limit}")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
