"""Where a run sends what it makes: a hub repository, a W&B team; and which files of its own it runs, for rewards and rows. A
run folder from elsewhere cannot decide that for its reader.

A run that this user began on this machine carries a mark in run.json, made with a key in the user's cache folder. Without a
valid mark, as on another machine, `resume=` asks for them to be typed beside it. Imports nothing heavy.
"""

import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from sft.config.keys import in_shell, words_of
from sft.config.own_code import own_function
from sft.config.reward_names import reward_files
from sft.config.schema import Settings
from sft.config.tracking_rules import trackers_of
from sft.errors import Problem
from sft.storage import cache

CODE = ("method.reward_funcs", "dataset.format")
"""Settings that name files of the user's own, which are run."""

KEYS = ("export.hub.repo", "tracking.entity", "tracking.log_adapter", *CODE)


def destinations(settings: Settings) -> dict[str, str]:
    """The destinations that settings name, by their keys. Without a W&B team a run goes to the reader's own account.

    That it sends its weights there counts as one.
    """
    found = {}
    if settings.export.hub.repo and settings.export.formats:
        found["export.hub.repo"] = settings.export.hub.repo
    if trackers_of(settings.tracking) and settings.tracking.entity:
        found["tracking.entity"] = settings.tracking.entity
    if trackers_of(settings.tracking) and settings.tracking.log_adapter:
        found["tracking.log_adapter"] = "true"  # weights, to the reader's own account
    return found


def own_code(settings: Settings) -> dict[str, str]:
    """The settings by which files of the user's own are run, as they are typed; empty without any."""
    names, found = settings.method.reward_funcs, {}
    if reward_files(names):
        found["method.reward_funcs"] = words_of(names)
    if settings.dataset.format:
        found["dataset.format"] = words_of(settings.dataset.format)
    return found


def code_files(settings: Settings) -> list[Path]:
    """The files of the user's own that a run has run, each once."""
    files = [*reward_files(settings.method.reward_funcs).values()]
    files += [own.file] if (own := own_function(settings.dataset.format or "")) else []
    return list(dict.fromkeys(files))


def mark(settings: Settings) -> str | None:
    """What run.json keeps of destinations and files that are run: their signature. None without any, or where the key cannot be
    kept.
    """
    key = _key(create=True) if destinations(settings) or own_code(settings) else None
    return _sign(settings, key) if key else None


def is_vouched_for(settings: Settings, record: dict[str, Any]) -> bool:
    """Whether the mark of a recorded run says that this user began it on this machine, with these destinations and files."""
    known, key = record.get("destinations_mark"), _key(create=False)
    return bool(key) and isinstance(known, str) and hmac.compare_digest(known.encode(), _sign(settings, key).encode())


def check_destinations(settings: Settings, record: dict[str, Any], typed: list[str], what: str) -> list[Problem]:
    """The destinations of a recorded run, and the files it runs, that neither its mark nor the command line vouches for; `what`
    names the run.
    """
    if is_vouched_for(settings, record):
        return []
    unsaid, code = (
        [word for name, value in some.items() if (word := f"{name}={value}") not in typed]
        for some in (destinations(settings), own_code(settings))
    )
    problems, all_words = [], f"{what} {' '.join(map(in_shell, [*unsaid, *code]))}"
    if unsaid:
        pushes = any(word.startswith("export.hub") for word in unsaid)
        public = " (public)" if pushes and not settings.export.hub.private else ""
        why = f"The run sends what it makes to {' and '.join(unsaid)}{public}, and it was not begun by you on this machine."
        problems.append(Problem(what, why, f"{all_words}   if that is where you want it"))
    if code:
        files = ", ".join(map(str, code_files(settings)))
        why = f"The run has Python code run that is in {files}, with your rights, and it was not begun by you on this machine."
        problems.append(Problem(what, why, f"{all_words}   if you have read that code"))
    return problems


def _sign(settings: Settings, key: bytes) -> str:
    content = json.dumps([destinations(settings) | own_code(settings), settings.export.hub.private, settings.export.formats],
                         sort_keys=True)  # fmt: skip
    return hmac.digest(key, content.encode(), "sha256").hex()


def _key(create: bool) -> bytes | None:
    """The user's key; None where there is none, or it cannot be kept."""
    file = cache.cache_dir() / "destinations.key"
    try:
        if create and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(f"{file}.{os.getpid()}.{secrets.token_hex(4)}")
            beside.touch(mode=0o600)
            beside.write_bytes(secrets.token_bytes(32))
            beside.rename(file)
        return file.read_bytes() or None
    except OSError:
        return None
