"""What each export is worth, in a sentence."""

from typing import Any

from sft.report.texts import Say
from sft.storage.jsonio import number

ALL = 0.95
"""Share of the training's gain from which on it counts as kept."""

MOST = 0.5
"""Share below which an export is not recommended, though it holds."""


def describe_exports(verify: dict, say: Say) -> list[dict[str, Any]]:
    """A `sentence` and a `tone` (good, warn or bad) for each export of verify.json, in its order. The smallest file that keeps
    all of the gain is the one to use.
    """
    artifacts = verify.get("artifacts") or {}
    whole = [key for key, fact in artifacts.items() if _size(fact) and _is_whole(fact) and key != "adapter"]
    best = min(whole, key=lambda key: _size(artifacts[key]), default=None)
    return [{"key": key, **_describe(key, fact, best == key, say)} for key, fact in artifacts.items()]


def _describe(key: str, fact: dict, is_best: bool, say: Say) -> dict[str, str]:
    status, kept = fact.get("status"), number(fact.get("gain_kept"))
    size = say("at {size} MB", size=f"{_size(fact) / 1e6:,.0f}" if _size(fact) >= 1e7 else f"{_size(fact) / 1e6:,.1f}")
    if status not in ("ok", "failed"):
        return {"tone": "bad", "sentence": say("{key} could not be made: {why}", key=key, why=fact.get("error") or "–")}
    gain = _gain(kept, fact, say)
    if status == "failed":
        failed = ", ".join(map(str, fact.get("failed") or [])) or "–"
        return {
            "tone": "bad",
            "sentence": say("Do not use {key}: it {gain} (failed: {failed}).", key=key, gain=gain, failed=failed),
        }
    if key == "adapter":
        text = say("{key}, loaded beside the base model, {gain}, {size}.", key=key, gain=gain, size=size)
        return {"tone": "good", "sentence": text}
    if is_best:
        return {"tone": "good", "sentence": say("Use {key}: it {gain}, {size}.", key=key, gain=gain, size=size)}
    low = kept is not None and kept < MOST
    return {"tone": "warn" if low else "good", "sentence": say("{key} {gain}, {size}.", key=key, gain=gain, size=size)}


def _gain(kept: float | None, fact: dict, say: Say) -> str:
    if kept is None:
        change = number(fact.get("loss_increase"))
        return say("changes the loss by {change}", change=f"{change:+.4f}") if change is not None else say("holds")
    if kept >= ALL:
        return say("keeps all of the gain")
    return say("keeps {share} of the gain", share=f"{kept:.0%}") if kept > 0 else say("keeps nothing of the gain")


def _is_whole(fact: dict) -> bool:
    return fact.get("status") == "ok" and (number(fact.get("gain_kept")) or 0.0) >= ALL


def _size(fact: dict) -> float:
    return number(fact.get("size_bytes")) or 0.0
