"""Where a run sends what it makes: a hub repository, a W&B team. A run folder from elsewhere cannot decide that for its reader.

A run that this user began on this machine carries a mark in run.json, made with a key in the user's cache folder. Without a
valid mark, as on another machine, `resume=` asks for the destinations to be typed beside it. Imports nothing heavy.
"""

import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from sft.config.schema import Settings
from sft.config.tracking_rules import trackers_of
from sft.errors import Problem
from sft.storage import cache

KEYS = ("export.hub.repo", "tracking.entity", "tracking.log_adapter")


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


def mark(settings: Settings) -> str | None:
    """What run.json keeps of the destinations: their signature. None without any, or where the key cannot be kept."""
    key = _key(create=True) if destinations(settings) else None
    return _sign(settings, key) if key else None


def check_destinations(settings: Settings, record: dict[str, Any], typed: list[str], what: str) -> list[Problem]:
    """The destinations of a recorded run that neither its mark nor the command line vouches for; `what` names the run."""
    known, key = record.get("destinations_mark"), _key(create=False)
    if key and isinstance(known, str) and hmac.compare_digest(known.encode(), _sign(settings, key).encode()):
        return []
    unsaid = [f"{name}={value}" for name, value in destinations(settings).items() if f"{name}={value}" not in typed]
    if not unsaid:
        return []
    public = " (public)" if any(word.startswith("export.hub") for word in unsaid) and not settings.export.hub.private else ""
    why = f"The run sends what it makes to {' and '.join(unsaid)}{public}, and it was not begun by you on this machine."
    return [Problem(what, why, f"{what} {' '.join(unsaid)}   if that is where you want it")]


def _sign(settings: Settings, key: bytes) -> str:
    content = json.dumps([destinations(settings), settings.export.hub.private, settings.export.formats], sort_keys=True)
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
