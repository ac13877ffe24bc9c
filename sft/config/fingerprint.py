"""Hashes and seeds that say whether two runs are the same one."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any

from sft.config.own_code import contents_hash, own_function
from sft.config.reward_names import reward_files
from sft.config.schema import DatasetSettings, Settings
from sft.storage.jsonio import jsonable


def row_seed(settings: Settings) -> int:
    """The seed that shuffles the rows and so decides which are held out."""
    return settings.seed if settings.dataset.seed is None else settings.dataset.seed


AROUND = ("tracking", "resume", "export", "sweep", "preflight", "distributed", "report")
"""Settings that do not shape the result."""

LIMITS = ("max_hours", "stop_at", "max_bad_steps", "max_memory_gib")
"""Of those of the trainer."""


ADDED: tuple[str, ...] = (
    "model.load_in_fp8",
    "dataset.columns.tools",
    "dataset.columns.history",
    "dataset.columns.reasoning",
    "dataset.columns.chosen",
    "dataset.columns.rejected",
    "dataset.columns.answer",
    "method.reference",
    "method.num_generations",
    "method.max_completion_length",
    "method.temperature",
    "method.reward_funcs",
    "method.reward_weights",
    "method.reward_options",
    "method.scale_rewards",
    "method.epsilon",
    "method.epsilon_high",
    "method.num_iterations",
    "method.mask_truncated_completions",
    "method.max_idle_steps",
    "method",
    "dataset.reasoning",
    "dataset.chat_template_kwargs",
    "dataset.special_tokens_in_text",
    "dataset.ignore_columns",
    "dataset.skip_bad_rows",
    "dataset.format",
    "dataset.eval_path",
    "lora.start_from",
    "lora.extra",
)
"""Settings, or whole groups, that are younger than the first recorded hashes. Add each new one, before its group."""


CHANGED = {"samples.num_held_out": 4}
"""Settings whose default has changed, with the earlier one, which recorded hashes hold. The two count as the same."""


def config_hash(settings: Settings) -> str:
    """Hash of the resolved settings that shape the result: not tracking, limits, exports, checks, sweeps, processes,
    reports.

    A setting of `ADDED` at its default is left out, and one of `CHANGED` counts as its earlier default, so that finished jobs
    of older versions are not run again. Files of the user's own code count by their contents.
    """
    shaping = {k: v for k, v in jsonable(settings).items() if k not in AROUND}
    shaping["dataset"]["seed"] = row_seed(settings)
    shaping["trainer"] = {k: v for k, v in shaping["trainer"].items() if k not in LIMITS}
    if files := reward_hashes(settings):
        shaping["reward_files"] = files
    if format_file := format_hash(settings.dataset):
        shaping["format_file"] = format_file
    return hashlib.sha256(json.dumps(as_recorded(shaping), sort_keys=True).encode()).hexdigest()[:16]


def reward_hashes(settings: Settings) -> dict[str, str | None]:
    """The hash of the file of each reward of the user's own; None where it cannot be read."""
    return {name: contents_hash(file) for name, file in reward_files(settings.method.reward_funcs).items()}


def format_hash(data: DatasetSettings) -> str | None:
    """The hash of the file of `dataset.format`; None without one, and where it cannot be read."""
    own = own_function(data.format) if data.format else None
    return contents_hash(own.file) if own else None


def as_recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """Plain settings as recorded hashes hold them: without those of `ADDED` that have their defaults, and with the earlier
    default of `CHANGED`; changed in place.
    """
    defaults = jsonable(Settings())
    for key, earlier in CHANGED.items():
        group, name = key.split(".")
        if settings[group][name] == defaults[group][name]:
            settings[group][name] = earlier
    for key in ADDED:
        *path, name = key.split(".")
        group, default = settings, defaults
        for part in path:
            group, default = group[part], default[part]
        if group[name] == default[name]:
            del group[name], default[name]
    return settings


def differs_from(settings: Any, defaults: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Settings whose value is not the default: {"lora.r": {"default": 16, "value": 8}}."""
    found = {}
    for field in fields(settings):
        value, default = getattr(settings, field.name), getattr(defaults, field.name)
        if is_dataclass(value):
            found |= differs_from(value, default, f"{prefix}{field.name}.")
        elif value != default:
            found[prefix + field.name] = {"default": jsonable(default), "value": jsonable(value)}
    return found
