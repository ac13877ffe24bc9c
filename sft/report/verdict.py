"""Whether a run is better than what it began with, by its held-out rows: the change of each, and how sure that is."""

import math
from typing import Any

from sft.config.method import DPO, MethodFacts, facts_of
from sft.report.texts import Say
from sft.storage.jsonio import number

FEWEST_ROWS = 8
"""Rows from which on an interval is given: of fewer the normal approximation says nothing."""

Z = 1.959964
"""97.5 % point of the normal distribution."""


def paired_interval(changes: list[float], weights: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the change of a weighted mean over the same rows before and after, with 95 % confidence.

    The mean is a ratio of sums over rows, whose variance is Cochran's (Sampling Techniques, 1977, chapter 6); rows are what
    was drawn, and the tokens of one are not independent (Miller, Adding Error Bars to Evals, arXiv 2411.00640, on paired
    differences and clustered errors). With equal weights it is the paired t interval.
    """
    total, count = sum(weights), len(changes)
    mean = sum(c * w for c, w in zip(changes, weights, strict=True)) / total
    squares = sum((w / total * (c - mean)) ** 2 for c, w in zip(changes, weights, strict=True))
    half = student(count - 1) * math.sqrt(squares * count / (count - 1))
    return mean, mean - half, mean + half


def student(freedom: int) -> float:
    """97.5 % point of Student's t, to 0.001 from 7 degrees of freedom on (Abramowitz and Stegun 26.7.5)."""
    z3, z5, z7 = Z**3, Z**5, Z**7
    first, second = (z3 + Z) / 4, (5 * z5 + 16 * z3 + 3 * Z) / 96
    return Z + first / freedom + second / freedom**2 + (3 * z7 + 19 * z5 + 17 * z3 - 15 * Z) / 384 / freedom**3


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent ones (Wilson, 1927)."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return middle - half, middle + half


def judge(run: dict, rows: list[dict], lines: list[dict], margins: list[dict], say: Say) -> dict[str, Any] | None:
    """The verdict on a run: a `headline`, its `tone` (good, bad or warn) and `lines` that give the reasons; None where nothing
    was measured before and after.

    `rows` are those of metrics.jsonl by step, `lines` those of eval_rows.jsonl, `margins` those of margins.jsonl.
    """
    method, metrics = facts_of(run), run.get("metrics") or {}
    start, end = number(metrics.get(f"{method.metric}_start")), number(metrics.get(method.metric))
    evaluated = any(row["step"] and row.get(method.metric) is not None for row in rows)
    if start is None or end is None or not evaluated:
        return None
    kept = metrics.get("kept_step", metrics.get("steps"))
    before, after = line_of(lines, 0), line_of(lines, kept)
    found = _of_pairs(margins, kept, say) if method is DPO else _of_rows(method, before, after, say)
    verdict = found or {"tone": "warn", "headline": say("The change has no interval"), "lines": [_no_rows(say)]}
    verdict["lines"] = [_of_metric(method, start, end, say), *verdict["lines"], *_of_steps(method, rows, kept, say)]
    return verdict


def line_of(lines: list[dict], step: Any) -> dict:
    """The last line of a step, which a resumed run has written anew."""
    return next((line for line in reversed(lines) if line.get("step") == step), {})


def _of_metric(method: MethodFacts, start: float, end: float, say: Say) -> str:
    text = say("{title}: {start} before training, {end} after", title=say(method.title.capitalize()), start=f"{start:.4f}",
               end=f"{end:.4f}")  # fmt: skip
    if method.metric != "eval_loss" or method is DPO or max(start, end) > 100:
        return say("{text}.", text=text)
    return say("{text}; perplexity {start}, then {end}.", text=text, start=_perplexity(start), end=_perplexity(end))


def _perplexity(loss: float) -> str:
    value = math.exp(loss)
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _no_rows(say: Say) -> str:
    return say("This run kept no values of single rows, so it is not known how much of the change is chance.")


def _of_rows(method: MethodFacts, before: dict, after: dict, say: Say) -> dict[str, Any] | None:
    """What the changes of the held-out rows come to; None where they are not known of both."""
    name = "rewards" if method.greater_is_better else "losses"
    if before is after:
        return None
    headlines = (
        say("Better than before training, on rows that it has not seen"),
        say("Worse than before training, on rows that it has not seen"),
        say("Too few rows to tell: the change may be chance"),
    )
    return judge_rows(before.get(name), after.get(name), before.get("targets"), method.greater_is_better, headlines, say)


def judge_rows(
    first: list | None, last: list | None, targets: list | None, greater: bool, headlines: tuple[str, str, str], say: Say
) -> dict[str, Any] | None:
    """A `headline`, its `tone` and `lines` on the change from `first` to `last`, values of the same held-out rows weighted by
    `targets`; None where they are not known of all rows. `greater` says that more is better; the `headlines` are those of
    better rows, of worse ones, and of a change that may be chance.
    """
    first, last = first or [], last or []
    if not first or len(first) != len(last) or None in map(number, [*first, *last]):
        return None
    sign = 1 if greater else -1
    changes = [b - a for a, b in zip(first, last, strict=True)]
    weights = targets or [1] * len(changes)
    if len(weights) != len(changes) or None in map(number, weights) or sum(weights) <= 0:
        return None
    count, gained = len(changes), sum(sign * change > 0 for change in changes)
    shares = [say("Better on {better} of {count} held-out rows, worse on {worse}.", better=gained, count=count,
                  worse=sum(sign * change < 0 for change in changes))]  # fmt: skip
    if count < FEWEST_ROWS:
        headline = say("Too few rows to tell: {count} held out, {fewest} are needed", count=count, fewest=FEWEST_ROWS)
        return {"tone": "warn", "headline": headline, "lines": shares}
    mean, low, high = paired_interval(changes, weights)
    interval = say("The change over these rows is {mean}, with 95 % confidence between {low} and {high} (paired by row).",
                   mean=_signed(mean), low=_signed(low), high=_signed(high))  # fmt: skip
    if low <= 0 <= high:
        tone, headline = "warn", headlines[2]
    elif sign * mean > 0:
        tone, headline = "good", headlines[0]
    else:
        tone, headline = "bad", headlines[1]
    return {"tone": tone, "headline": headline, "lines": [interval, *shares]}


def _of_pairs(margins: list[dict], kept: Any, say: Say) -> dict[str, Any] | None:
    """The share of held-out pairs whose chosen side gained more than the rejected one: half before training."""
    found = [margin for margin in line_of(margins, kept).get("margins") or [] if number(margin) is not None]
    if not found:
        return None
    count, right = len(found), sum((margin > 0) + 0.5 * (margin == 0) for margin in found)
    low, high = wilson_interval(right / count, count)
    text = say(
        "The chosen side gained more in {right} of {count} held-out pairs: accuracy {share}, with 95 % confidence between "
        "{low} and {high}; chance is 50 %.",
        right=f"{right:g}", count=count, share=f"{right / count:.0%}", low=f"{low:.0%}", high=f"{high:.0%}",
    )  # fmt: skip
    if count < FEWEST_ROWS or low <= 0.5 <= high:
        return {"tone": "warn", "headline": say("Too few pairs to tell: the accuracy may be chance"), "lines": [text]}
    if right / count > 0.5:
        return {"tone": "good", "headline": say("It prefers what was chosen, in pairs that it has not seen"), "lines": [text]}
    return {"tone": "bad", "headline": say("It prefers what was rejected, in pairs that it has not seen"), "lines": [text]}


def _of_steps(method: MethodFacts, rows: list[dict], kept: Any, say: Say) -> list[str]:
    """Whether it was trained for too long, by the kept step against the last one."""
    evaluated = [(row["step"], row[method.metric]) for row in rows if row["step"] and row.get(method.metric) is not None]
    values = dict(evaluated)
    if len(evaluated) < 2:
        return [say("It was evaluated once after training began, so overfitting would not show (trainer.eval_steps).")]
    (last, end), (_, previous) = evaluated[-1], evaluated[-2]
    if kept in values and kept != last and method.is_worse(end, values[kept]):
        return [say("Overfitting: the weights of step {kept} are kept ({best}); at the last step, {last}, it was {end}.",
                    kept=f"{kept:g}", best=f"{values[kept]:.4f}", last=f"{last:g}", end=f"{end:.4f}")]  # fmt: skip
    if method.is_worse(previous, end):
        return [say("No sign of overfitting: the last step is the best one. Longer training may bring more.")]
    return [say("No sign of overfitting.")]


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
