"""What things are called in trackers: as transformers' and TRL's own callbacks name them, so that runs share charts.

The keys of metrics.jsonl and run.json are others, and stay.
"""

import itertools
import os
from pathlib import Path
from typing import Any

from sft.config.method import MethodFacts
from sft.config.schema import TrackingSettings
from sft.storage.jsonio import each_line, number, read_lines

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


SHOWN_ROLLOUTS = 4
"""Completions of a logged step in the table of rollouts: the best and the worst of a prompt, and some between."""

MAX_TEXT = 4000
"""Characters of a prompt or a completion in that table; rollouts.jsonl has all."""


class RolloutTable:
    """The table of rollouts: of a logged step a few completions of the prompt whose rewards differ most.

    The longer a run, the fewer of its steps are in it: each of the first 100, and 50 more whenever their number doubles.
    """

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        """Those there are so far."""
        self.names: list[str] = []
        """Of the rewards."""
        self.kept: dict[float, dict] = {}
        """The line of rollouts.jsonl to choose from, by step, of steps that are not logged yet."""

    @property
    def columns(self) -> list[str]:
        """What the cells of a row are."""
        return ["step", "row", "prompt", "completion", "finish", "reward", *(f"reward/{n}" for n in self.names), "advantage"]

    def keep(self, lines: list[dict]) -> None:
        """Take the lines of rollouts.jsonl of one step."""
        lines = [line for line in lines if line.get("completions")]
        if lines:
            self.kept[lines[0]["step"]] = max(lines, key=_spread)

    def take(self, step: int) -> list[list[Any]]:
        """The rows that the table gets with the log line of this step, the best completion first."""
        found = [self.kept.pop(at) for at in sorted(self.kept) if at <= step][-1:]
        stride = 1 << max(0, int(step // 50).bit_length() - 1)
        rows = [row for line in found for row in self._rows_of(line)] if step % stride == 0 else []
        self.rows += rows
        return rows

    def replay(self, folder: Path, step: int) -> None:
        """Take what a run that was cut had before this step."""
        logged = [number(line.get("step")) for line in read_lines(folder / "metrics.jsonl") if "reward" in line]
        logged = [at for at in logged if at is not None and at < step]
        lines = (line for line in each_line(folder / "rollouts.jsonl") if number(line.get("step")) is not None)
        for at, some in itertools.groupby(lines, key=lambda line: line["step"]):
            while logged and logged[0] < at:
                self.take(logged.pop(0))
            if at < step:
                self.keep([*some])
        for at in logged:
            self.take(at)

    def _rows_of(self, line: dict) -> list[list[Any]]:
        ranked = sorted(line["completions"], key=_reward_of, reverse=True)
        self.names = self.names or [*(ranked[0].get("rewards") or {})]
        last = len(ranked) - 1
        places = sorted({round(i * last / (SHOWN_ROLLOUTS - 1)) for i in range(SHOWN_ROLLOUTS)})
        return [
            [line["step"], line.get("row"), _cut(line.get("prompt")), _cut(one.get("text")), one.get("finish"),
             one.get("reward"), *((one.get("rewards") or {}).get(name) for name in self.names), one.get("advantage")]
            for one in (ranked[place] for place in places)
        ]  # fmt: skip


def _reward_of(completion: dict) -> float:
    return number(completion.get("reward")) or 0.0


def _spread(line: dict) -> float:
    rewards = [_reward_of(one) for one in line["completions"]]
    return max(rewards) - min(rewards)


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"


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
