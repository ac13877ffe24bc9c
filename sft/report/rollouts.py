"""What the report shows of learning from rewards: the curves, and the best and the worst prompts of some steps."""

import re
from pathlib import Path
from typing import Any

from sft.report.texts import Say
from sft.storage.forms import FORMS, fit, warn
from sft.storage.jsonio import number, parse

CHARTS = [
    ("entropy", "Entropy (nats a token)", ".3~f", [("entropy", "Entropy", "main")]),
    ("length", "Completion length (tokens)", ".4~g", [("length", "Training", "main"), ("eval_length", "Held-out", "held")]),
    ("ended", "Completions that ended by themselves", ".0%",
     [("ended", "Training", "main"), ("eval_ended", "Held-out", "held")]),
    ("zero_groups", "Prompts whose rewards are all equal", ".0%", [("zero_groups", "Share", "thin")]),
    ("kl", "KL from the reference (nats a token)", ".3~g", [("kl", "KL", "main")]),
]  # fmt: skip
"""As those of page.py."""


def reward_charts(rows: list[dict], say: Say = str) -> tuple[list[dict], list[tuple]]:
    """(`rows` with names of fields that a chart takes, the charts of a run that is rewarded): the weighted sum, and each reward
    where there are several. `say` translates the word before a reward's name.
    """
    found = dict.fromkeys(key.removeprefix("eval_").removeprefix("reward/") for row in rows for key in row if _of_reward(key))
    fields = {name: f"reward_{at}" for at, name in enumerate(found)}
    named = {f"{split}reward/{name}": f"{split}{field}" for name, field in fields.items() for split in ("", "eval_")}
    charts = [_reward_chart("reward", "Reward")]
    charts += [_reward_chart(field, f"{say('Reward')}: {name}") for name, field in fields.items() if len(fields) > 1]
    charts += [chart for chart in CHARTS if chart[0] != "kl" or any("kl" in row for row in rows)]
    return [{named.get(key, key): value for key, value in row.items()} for row in rows], charts


def _of_reward(key: str) -> bool:
    return key.startswith(("reward/", "eval_reward/"))


def _reward_chart(field: str, title: str) -> tuple[str, str, str, list[tuple[str, str, str]]]:
    lines = [(field, "Training", "raw"), ("smooth", "Training, smoothed", "main"), (f"eval_{field}", "Held-out", "held")]
    return field, title, ".3~f", lines


# ------------------------------------------------------------------------------------------------------- rollouts

SHOWN_STEPS = 5
"""Steps whose rollouts are shown: the first, the last, and some between."""

MOST, MAX_TEXT = 16, 1500
"""Completions of a prompt, and characters of a text, that are shown."""

STEP = re.compile(rb'\s*\{"step": (\d+)[,}]')
"""How a line of rollouts.jsonl begins."""


def summarise_rollouts(path: Path) -> list[dict[str, Any]]:
    """The prompts with the highest and the lowest mean reward of SHOWN_STEPS steps of rollouts.jsonl, the completions of each
    by their reward; empty without the file. Only lines of these steps are parsed: the file may be larger than the memory.
    """
    places, odd, shown = _find_steps(path), [], []
    if not places:
        return []
    steps, last = [*places], len(places) - 1
    with open(path, "rb") as file:
        for at in sorted({round(i * last / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)}):
            groups = [group for place in places[steps[at]] if (group := _read_group(file, place, odd))]
            groups.sort(key=lambda group: -group["mean"])
            shown += [{"step": steps[at], "groups": groups[:1] + groups[1:][-1:], "count": len(groups)}] if groups else []
    if odd:
        warn(path, odd)
    return shown


def _find_steps(path: Path) -> dict[int, list[int]]:
    """Where the lines of each step begin, the steps in their order."""
    places: dict[int, list[int]] = {}
    if path.is_file():
        with open(path, "rb") as file:
            at = 0
            for line in file:
                if found := STEP.match(line):
                    places.setdefault(int(found.group(1)), []).append(at)
                at += len(line)
    return dict(sorted(places.items()))


def _read_group(file: Any, place: int, odd: list[str]) -> dict[str, Any] | None:
    """A prompt with its completions, the best first; None for a line that holds none."""
    file.seek(place)
    line = fit(parse(file.readline().decode("utf-8", errors="replace")), FORMS["rollouts.jsonl"], odd, f"byte {place}")
    rewarded = [one for one in line.get("completions") or [] if number(one.get("reward")) is not None]
    if not rewarded:
        return None
    rewarded.sort(key=lambda one: -one["reward"])
    shown = rewarded if len(rewarded) <= MOST else rewarded[: MOST // 2] + rewarded[-MOST // 2 :]
    rewards = [one["reward"] for one in rewarded]
    return {
        "row": line.get("row"),
        "prompt": _cut(line.get("prompt")),
        "mean": sum(rewards) / len(rewards),
        "equal": rewards[0] == rewards[-1],
        "names": [*dict.fromkeys(name for one in shown for name in one.get("rewards") or {})],
        "completions": [{**one, "text": _cut(one.get("text"))} for one in shown],
        "left_out": len(rewarded) - len(shown),
    }


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"
