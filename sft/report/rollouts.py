"""What the report shows of learning from rewards: the curves, and the best and the worst completions of some steps."""

CHARTS = [
    ("entropy", "Entropy (nats a token)", ".3~f", [("entropy", "Entropy", "main")]),
    ("length", "Completion length (tokens)", ".4~g", [("length", "Training", "main"), ("eval_length", "Held-out", "held")]),
    ("ended", "Completions that ended by themselves", ".0%",
     [("ended", "Training", "main"), ("eval_ended", "Held-out", "held")]),
    ("zero_groups", "Prompts whose rewards are all equal", ".0%", [("zero_groups", "Share", "thin")]),
    ("kl", "KL from the reference (nats a token)", ".3~g", [("kl", "KL", "main")]),
]  # fmt: skip
"""As those of page.py."""


def reward_charts(rows: list[dict]) -> tuple[list[dict], list[tuple]]:
    """(`rows` with names of fields that a chart takes, the charts of a run that is rewarded): the weighted sum, and each reward
    where there are several.
    """
    found = dict.fromkeys(key.removeprefix("eval_").removeprefix("reward/") for row in rows for key in row if _of_reward(key))
    fields = {name: f"reward_{at}" for at, name in enumerate(found)}
    named = {f"{split}reward/{name}": f"{split}{field}" for name, field in fields.items() for split in ("", "eval_")}
    charts = [_reward_chart("reward", "Reward")]
    charts += [_reward_chart(field, f"Reward: {name}") for name, field in fields.items() if len(fields) > 1]
    charts += [chart for chart in CHARTS if chart[0] != "kl" or any("kl" in row for row in rows)]
    return [{named.get(key, key): value for key, value in row.items()} for row in rows], charts


def _of_reward(key: str) -> bool:
    return key.startswith(("reward/", "eval_reward/"))


def _reward_chart(field: str, title: str) -> tuple[str, str, str, list[tuple[str, str, str]]]:
    lines = [(field, "Training", "raw"), ("smooth", "Training, smoothed", "main"), (f"eval_{field}", "Held-out", "held")]
    return field, title, ".3~f", lines
