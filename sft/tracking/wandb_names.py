"""What things are called in Weights & Biases: as transformers' and TRL's own callbacks name them, so that runs share charts.

The keys of metrics.jsonl and run.json are others, and stay.
"""

from typing import Any

from sft.config.method import MethodFacts

AXIS, TOKENS, HELD_OUT = "train/global_step", "train/num_tokens", "eval/loss"

NAMES = {
    "step": AXIS,
    "tokens": TOKENS,
    "eos_share": "samples/eos_share",
    "tokens_per_second": "perf/tokens_per_second",
    "memory_gib": "perf/memory_gib",
}

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


def name_metric(key: str) -> str:
    """W&B's name of a key of metrics.jsonl."""
    if key in NAMES:
        return NAMES[key]
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def name_metrics(line: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A line of metrics.jsonl by W&B's names. Each has `tokens`, those trained on so far, as a second axis."""
    return {name_metric(key): value for key, value in {"tokens": tokens, **line}.items()}


def define_metrics(run: Any, method: MethodFacts) -> None:
    """The axis of every chart, and the best and last value of what runs of this method are ranked by."""
    run.define_metric(AXIS)
    run.define_metric("*", step_metric=AXIS)
    run.define_metric(HELD_OUT, step_metric=AXIS, summary="min,last")
    if name_metric(method.metric) != HELD_OUT:
        best = "max" if method.greater_is_better else "min"
        run.define_metric(name_metric(method.metric), step_metric=AXIS, summary=f"{best},last")
