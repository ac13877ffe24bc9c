"""The completions of the same prompts before, during and after training, those that changed most first."""

import difflib
from typing import Any

from sft.storage.jsonio import number

LOOP = 12
"""Tokens that a repetition at the end of a completion takes at least."""

COMPARED = 300
"""Characters by which two completions are compared."""


def group_samples(samples: list[dict]) -> dict[str, Any]:
    """Group generations by prompt: the base model's completion (step 0) and the later ones by step."""
    prompts: dict[tuple, dict] = {}
    for sample in samples:
        if (step := number(sample.get("step"))) is not None:
            key = (str(sample.get("source")), str(sample.get("index")))
            prompts.setdefault(key, {"first": sample, "completions": {}})["completions"][step] = sample
    steps = sorted({step for prompt in prompts.values() for step in prompt["completions"]} - {0})
    return {"prompts": list(prompts.values()), "steps": steps}


def judge_samples(samples: list[dict]) -> dict[str, Any]:
    """`group_samples` with the prompts whose completion changed most first, each completion with its `marks`; and of the first
    and the last step how many completions ended by themselves.
    """
    found = group_samples(samples)
    for prompt in found["prompts"]:
        for sample in prompt["completions"].values():
            sample["marks"] = marks_of(sample)
    last = found["steps"][-1] if found["steps"] else None
    found["prompts"].sort(key=lambda prompt: -_change(prompt["completions"].get(0), prompt["completions"].get(last)))
    found["ended"] = {step: _ended(found["prompts"], step) for step in (0, last) if step is not None}
    return found


def marks_of(sample: dict) -> dict[str, Any]:
    """What can be seen of a completion without reading it: `blank`, `repeated`, its number of `tokens`."""
    text, ids = sample.get("completion") or "", sample.get("completion_ids") or []
    return {
        "blank": not text.strip(),
        "repeated": bool(text.strip()) and repeats(ids or list(text)),
        "tokens": len(ids) or None,
    }


def repeats(items: list[Any]) -> bool:
    """Whether the end is the same piece three times or more, which takes at least LOOP items."""
    for period in range(1, len(items) // 3 + 1):
        length = max(3 * period, LOOP)
        if length <= len(items) and all(items[-i] == items[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


def _change(before: dict | None, after: dict | None) -> float:
    """How unlike two completions are, between 0 and 1; 0 where one is missing."""
    if before is None or after is None:
        return 0.0
    texts = [(sample.get("completion") or "")[:COMPARED] for sample in (before, after)]
    return 1 - difflib.SequenceMatcher(None, *texts, autojunk=False).ratio()


def _ended(prompts: list[dict], step: float) -> tuple[int, int]:
    """(completions of a step that ended by themselves, all of them)."""
    found = [prompt["completions"][step] for prompt in prompts if step in prompt["completions"]]
    return sum(sample.get("finish") == "eos" for sample in found), len(found)
