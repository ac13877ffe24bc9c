"""The form that the files of a run and of a sweep have: what is of another form is left out, by its key, with a warning.

A file may come from elsewhere, from another version, or from an editor. Keys that are not named here are nobody's business.
"""

import functools
import logging
from pathlib import Path
from typing import Any

from sft.sanitize import shown

log = logging.getLogger(__name__)

TEXT, FLAG, NUMBER, ANY = str, bool, (int, float), object

NUMBERS, TEXTS = {...: NUMBER}, {...: TEXT}

# A table's keys have a form each, and `...` is that of all others; a list has the form of its items.
RUN = {
    **dict.fromkeys(("status", "reason", "name", "command", "config_hash", "git_commit", "started_at", "ended_at"), TEXT),
    "overrides": [TEXT],
    "tags": [TEXT],
    "choices": TEXTS,
    "seconds": NUMBERS,
    "metrics": NUMBERS,
    "split": {"gradient_checkpointing": FLAG, ...: int},
    "plan": {"target_modules": [TEXT], ...: ANY},
    "data": {"source": TEXT, "hash": TEXT, "held_out_hash": TEXT, "eval_source": TEXT, "files": [TEXT], ...: NUMBER},
    "model": {
        "parameters": NUMBER,
        "trainable_parameters": NUMBER,
        **dict.fromkeys(("name", "source", "backend", "dtype"), TEXT),
    },
    "hardware": {"gpu_memory_gib": NUMBER, "memory_gib": NUMBER, "cpu_count": NUMBER},
    "sessions": [{}],
    "start_from": TEXTS,
    "reference": TEXTS,
    "reward_files": TEXTS,
    "error": TEXTS,
    "artifacts": TEXTS,
    "versions": {},
    "tracking": {
        **dict.fromkeys(("tracker", "mode", "url", "sync", "id", "project", "entity", "group"), TEXT),
        "lines": NUMBER,
    },
    "settings": {},
    "differs_from_defaults": {...: {}},
}

PREFLIGHT = {
    **dict.fromkeys(("source", "data_hash", "held_out_hash", "shape", "template", "eos_token", "bos_token", "pad_token"), TEXT),
    **dict.fromkeys(("train_tokens", "eval_tokens", "trained_tokens", "truncated_rows", "dropped_rows"), NUMBER),
    "rows": NUMBERS,
    "lengths": {...: NUMBERS},
    "warnings": [TEXT],
    "stop_tokens": [TEXT],
    "files": [TEXT],
    "eval_source": TEXT,
    "examples": [{"text": TEXT, "tokens": [TEXT], "input_ids": [NUMBER], "labels": [NUMBER]}],
}

ARTIFACT = {
    **dict.fromkeys(("status", "path", "error"), TEXT),
    **dict.fromkeys(("loss", "loss_increase", "limit", "answers", "answers_equal", "near_ties", "widest_tie"), NUMBER),
    **dict.fromkeys(("as_merged", "eos_share", "gain_kept", "size_bytes", "seconds", "peak_memory_gib"), NUMBER),
    **dict.fromkeys(("margins", "margins_kept", "margins_in_noise"), NUMBER),
    **dict.fromkeys(("reward", "reward_change", "rewards", "rewards_equal"), NUMBER),
    "checks": [{"name": TEXT, "ok": FLAG}],
    "failed": [TEXT],
}

REFERENCE = {"source": TEXT, "weights": TEXT, "rewards_not_compared": TEXT, ...: NUMBER}

VERIFY = {
    "artifacts": {...: ARTIFACT},
    "files": {...: [TEXT]},
    "reference": REFERENCE,
    "hub": {...: TEXTS},
    "modelfile": TEXT,
}

SAMPLE = {
    **dict.fromkeys(("source", "prompt", "question", "reference", "completion", "finish"), TEXT),
    "step": NUMBER,
    "index": NUMBER,
    "completion_ids": [NUMBER],
}

MARGINS = {
    "step": NUMBER,
    "margins": [NUMBER],
    "log_ratios": [NUMBER],
    "pairs": [{"row": NUMBER, "prompt": TEXT, "chosen": TEXT, "rejected": TEXT}],
}

EVAL_ROWS = {"step": NUMBER, "losses": [NUMBER], "targets": [NUMBER], "rewards": [NUMBER]}

ROLLOUT = {
    "step": NUMBER,
    "row": NUMBER,
    "prompt": TEXT,
    "completions": [
        {"text": TEXT, "finish": TEXT, "tokens": NUMBER, "rewards": NUMBERS, "reward": NUMBER, "advantage": NUMBER}
    ],
}

FORMS = {
    **{"run.json": RUN, "preflight.json": PREFLIGHT, "verify.json": VERIFY},
    **{"samples.jsonl": SAMPLE, "margins.jsonl": MARGINS, "rollouts.jsonl": ROLLOUT},
    "eval_rows.jsonl": EVAL_ROWS,
}


def fit(value: Any, form: Any, odd: list[str], key: str = "") -> Any:
    """`value` without what is of another form than `form`, whose keys are added to `odd`.

    Null fits everywhere but among the tables of a list.
    """
    if value is None:
        return None
    if isinstance(form, dict) and isinstance(value, dict):
        kept = {k: fit(v, form.get(k, form.get(..., ANY)), odd, f"{key}.{k}" if key else k) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None or value[k] is None}
    if isinstance(form, list) and isinstance(value, list):
        tables = isinstance(form[0], dict)
        odd += [f"{key}[{i}]" for i, v in enumerate(value) if v is None and tables]
        kept = [fit(v, form[0], odd, f"{key}[{i}]") for i, v in enumerate(value)]
        return [new for new, old in zip(kept, value, strict=True) if new is not None or (old is None and not tables)]
    if isinstance(form, dict | list) or not isinstance(value, form) or (isinstance(value, bool) and form in (NUMBER, int)):
        odd.append(key)
        return None
    return value


def fitted(value: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a file holds, without the entries of an odd form; they earn a warning."""
    odd: list[str] = []
    value = fit(value, FORMS.get(path.name, {}), odd)
    if odd:
        warn(path, odd)
    return value


def warn(path: Path, odd: list[str]) -> None:
    """Warn of the entries of a file that are left out."""
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    _warn(f"{path}: ignored, because of an odd form: {', '.join(key[:80] for key in odd[:3])}{more}.")


@functools.cache
def _warn(text: str) -> None:
    """Say it once: a file is read several times."""
    log.warning("%s", shown(text))
