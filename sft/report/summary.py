"""What a run folder's lines come to: one line a step, and the few numbers that sum a run up."""

from sft.config.method import facts_of
from sft.storage.jsonio import number


def merge_steps(events: list[dict]) -> list[dict]:
    """Merge the log events of each step into one row, in step order; a resumed run's later values win."""
    rows: dict[float, dict] = {}
    for event in events:
        if (step := number(event.get("step"))) is not None:
            rows.setdefault(step, {}).update({key: number(value) for key, value in event.items()})
    return [rows[step] for step in sorted(rows)]


def summarise(run: dict, rows: list[dict]) -> dict:
    """Return run.json's metrics, with what a run that died early did not write there taken from its curves."""
    metrics, method = {}, facts_of(run)
    for key, field, choose in [
        ("loss", "loss", lambda v: v[-1]),
        (method.metric, method.metric, lambda v: v[-1]),
        (f"{method.metric}_start", method.metric, lambda v: v[0]),
        ("eos_share", "eos_share", lambda v: v[-1]),
        ("eos_share_start", "eos_share", lambda v: v[0]),
        ("memory_gib", "memory_gib", max),
        ("tokens", "tokens", max),
        ("steps", "step", max),
        ("epochs", "epoch", max),
    ]:
        values = [row[field] for row in rows if row.get(field) is not None]
        metrics |= {key: choose(values)} if values else {}
    metrics |= {key: value for key, value in run.get("metrics", {}).items() if value is not None}
    start, end = metrics.get(f"{method.metric}_start"), metrics.get(method.metric)
    if method.greater_is_better and start is not None and end is not None:
        metrics["change"] = end - start  # it may begin at 0
    elif start and end is not None:
        metrics["change"] = end / start - 1
    return metrics
