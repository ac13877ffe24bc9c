"""The rewards of greedy completions of an export's held-out prompts, by the functions that the run was trained by."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.config.compose import fill_settings
from sft.config.destinations import is_vouched_for
from sft.config.fingerprint import reward_hashes
from sft.config.schema import MethodName, Settings
from sft.errors import Refusal
from sft.export.measure import EvalResult, HeldOutRow
from sft.rewards import Reward, RewardFault, load_rewards, reward_row
from sft.runs import resume

log = logging.getLogger(__name__)

Rewarding = Callable[[EvalResult], list[list[float]]]
"""Gives the rewards of completions, by each function; empty where they cannot be known."""


def find_rewarding(
    folder: Path, settings: Settings, record: dict[str, Any], rows: list[HeldOutRow], tokenizer: Any
) -> tuple[Rewarding | None, str]:
    """(what rewards completions of the first `rows`, why there is nothing). A run of another method has neither."""
    if settings.method.name != MethodName.grpo:
        return None, ""
    rewards, why = _load(folder, settings, record)
    if not why and not all(row.columns for row in rows):
        why = "held_out.jsonl does not have the columns that rewards are given"
    if why:
        log.warning("The rewards of exports are not compared: %s.", why)
        return None, why

    def give(found: EvalResult) -> list[list[float]]:
        texts, given = [], []
        for row, ids, ended in zip(rows, found.completions, found.finished, strict=False):
            texts.append(tokenizer.decode(ids[:-1] if ended else ids))
            given.append(reward_row(row.entry, "ended" if ended else "length", len(ids)))
        try:
            with resume.working_folder(record, folder):
                return [list(one) for one in zip(*(reward.score(texts, given) for reward in rewards), strict=True)]
        except RewardFault as fault:
            log.warning("The rewards of an export are not compared: %s.", fault)
            return []

    return give, ""


def _load(folder: Path, settings: Settings, record: dict[str, Any]) -> tuple[list[Reward], str]:
    """(the rewards of a run, why they are not known): its own files only as they were then, and only if the user ran them."""
    if reward_hashes(settings) and not is_vouched_for(fill_settings(record.get("settings") or {}), record):
        return [], f"{_names(settings)} is code of a run that was not begun by you on this machine"
    with resume.working_folder(record, folder):
        then, now = record.get("reward_files") or {}, reward_hashes(settings)
        for name, found in now.items():
            if found is None or then.get(name) != found:
                return [], f"the file of {name} is {'gone' if found is None else 'another than in the run'}"
        try:
            return load_rewards(settings.method), ""
        except Refusal as refusal:
            return [], refusal.problems[0].why.removesuffix(".")


def _names(settings: Settings) -> str:
    return ", ".join(reward_hashes(settings))
