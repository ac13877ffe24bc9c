"""What things are called in trackers: as transformers' and TRL's own callbacks name them, so that runs share charts.

The keys of metrics.jsonl and run.json are others, and stay.
"""

import os
from pathlib import Path
from typing import Any

from sft.config.method import MethodFacts
from sft.config.schema import TrackingSettings
from sft.storage.jsonio import read_lines

PROJECT = "sft"
"""Where neither `tracking.project` nor a tracker's own settings name one."""

AXIS, TOKENS, HELD_OUT = "train/global_step", "train/num_tokens", "eval/loss"

NAMES = {
    "step": AXIS,
    "tokens": TOKENS,
    "eos_share": "samples/eos_share",
    "tokens_per_second": "perf/tokens_per_second",
    "memory_gib": "perf/memory_gib",
}

REWARDS = {
    "length": "completions/mean_length",
    "ended": "completions/clipped_ratio",
    "zero_groups": "frac_reward_zero_std",
    "clipped": "clip_ratio/region_mean",
    "sampler_gap": "sampling/sampling_logp_difference/mean",
}
"""What TRL's GRPOTrainer calls numbers of ours; `reward/<name>` is its `rewards/<name>/mean`, and the others have one name."""

OPPOSITES = ("ended",)
"""Shares that TRL logs of all others: there it is the share that was cut."""

SAMPLES = {
    "step": lambda line, base: line["step"],
    "question": lambda line, base: line.get("question") or line["prompt"],
    "base answer": lambda line, base: base,
    "answer": lambda line, base: line["completion"],
    "finish": lambda line, base: line["finish"],
    "reference": lambda line, base: line["reference"],
    "prompt_id": lambda line, base: line["index"],
    "source": lambda line, base: line.get("source", ""),
    "tokens": lambda line, base: len(line.get("completion_ids") or ()),
}
"""Columns of the table of samples, each from a line of samples.jsonl and the first completion of its prompt."""


def group_of(tracking: TrackingSettings) -> str | None:
    """The group of a run: as set, else the variable by which a sweep names its folder to its jobs, wherever they run."""
    return tracking.group or os.environ.get("WANDB_RUN_GROUP") or None


class Tokens:
    """Tokens trained on so far, a second axis that every line has."""

    def __init__(self, folder: Path) -> None:
        self.path, self.so_far = folder / "metrics.jsonl", None

    def at(self, metrics: dict[str, Any]) -> int:
        """Those at this line; before a resume those in metrics.jsonl, which ends at the checkpoint by the first line."""
        if self.so_far is None:
            lines = read_lines(self.path) if self.path.is_file() else ()
            self.so_far = ([0] + [line["tokens"] for line in lines if "tokens" in line])[-1]
        self.so_far = metrics.get("tokens", self.so_far)
        return self.so_far


def lines_before(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but the one that is just being logged: a killed tracker may not have written all of them."""
    return read_lines(folder / "metrics.jsonl")[:-1]


def sample_rows(lines: list[dict], earlier: list[dict]) -> list[list[Any]]:
    """The rows of `lines` in the table of samples; `earlier` may have the first completion of their prompts."""
    base: dict[int, str] = {}
    for line in [*earlier, *lines]:
        base.setdefault(line["index"], line["completion"])
    return [[cell(line, base[line["index"]]) for cell in SAMPLES.values()] for line in lines]


def name_metric(key: str) -> str:
    """A tracker's name of a key of metrics.jsonl."""
    if key in NAMES:
        return NAMES[key]
    name = key.removeprefix("eval_")
    split = "train" if name == key else "eval"
    if name.startswith("reward/"):
        return f"{split}/rewards/{name.removeprefix('reward/')}/mean"
    return f"{split}/{REWARDS.get(name, name)}"


def name_metrics(line: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A line of metrics.jsonl by these names. Each has `tokens`, those trained on so far, as a second axis."""
    shown = {key: 1 - value if key.removeprefix("eval_") in OPPOSITES and value is not None else value
             for key, value in line.items()}  # fmt: skip
    return {name_metric(key): value for key, value in {"tokens": tokens, **shown}.items()}


def define_metrics(run: Any, method: MethodFacts) -> None:
    """The axis of every chart, and the best and last value of what runs of this method are ranked by."""
    run.define_metric(AXIS)
    run.define_metric("*", step_metric=AXIS)
    run.define_metric(HELD_OUT, step_metric=AXIS, summary="min,last")
    if name_metric(method.metric) != HELD_OUT:
        best = "max" if method.greater_is_better else "min"
        run.define_metric(name_metric(method.metric), step_metric=AXIS, summary=f"{best},last")
