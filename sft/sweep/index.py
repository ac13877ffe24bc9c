"""sweep.json: which jobs a sweep has, where each of them lives, and how it went.

A job is its resolved settings. Its number and its folder are given once and stay when the grid grows.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.config import fingerprint
from sft.config.keys import flatten
from sft.config.method import facts_of
from sft.config.schema import GROUPS, Settings
from sft.errors import Refusal, refuse
from sft.storage import atomic, jsonio
from sft.storage.forms import NUMBER, TEXT, TEXTS, fit
from sft.storage.jsonio import number, read_json

log = logging.getLogger(__name__)

WAITING, RUNNING, FINISHED, DIVERGED, STOPPED, FAILED = "waiting", "running", "finished", "diverged", "stopped", "failed"

DONE = (FINISHED, DIVERGED)
"""Not run again: the same settings would end the same way."""


@dataclass
class Job:
    """One job of a sweep, as a row of sweep.json."""

    number: int
    folder: str
    """Name of its run folder inside the sweep's."""
    config_hash: str
    overrides: dict[str, str]
    """Every override of the job, as it was typed."""
    settings: dict[str, Any]
    """Its settings that are not the defaults, by dotted key."""
    status: str = WAITING
    """`waiting`, `running`, `finished`, `diverged` (ended, but what ranks it is not a number), `stopped` (cut, to be
    continued) or `failed`."""
    reason: str | None = None
    place: str | None = None
    """Its id in the queue of the cluster that has it."""
    attempts: int = 0
    seconds: float = 0.0
    """Wall time of all attempts that came to an end, in seconds."""

    @property
    def label(self) -> str:
        """Its folder's name without the number."""
        return without_number(self.folder)


JOB = {
    **dict.fromkeys(("folder", "config_hash", "status", "reason", "place"), TEXT),
    **{"number": int, "attempts": int, "seconds": NUMBER, "overrides": TEXTS, "settings": {}},
}

NEEDED = ("number", "folder", "config_hash", "overrides", "settings")

SWEEP = {**dict.fromkeys(("identity", "command", "created_at"), TEXT), "jobs": [JOB]}


@dataclass
class SweepIndex:
    """The jobs of one sweep. `save` writes them atomically to sweep.json."""

    folder: Path
    identity: str = ""
    """Hash of everything that the jobs of the sweep share."""
    command: str = ""
    """The last command that ran it."""
    created_at: str = ""
    jobs: list[Job] = field(default_factory=list)

    def save(self) -> None:
        """Write sweep.json, whole or not at all; a line a job."""
        head = {"identity": self.identity, "command": self.command, "created_at": self.created_at}
        lines = [f'  "{key}": {json.dumps(value, ensure_ascii=False)},' for key, value in head.items()]
        plain = {"ensure_ascii": False, "allow_nan": False, "default": jsonio.jsonable}  # by hand only what JSON does not know
        jobs = [f"    {json.dumps(vars(job), **plain)}" for job in self.jobs]
        text = "\n".join(["{", *lines, '  "jobs": [', ",\n".join(jobs), "  ]", "}", ""])
        atomic.write_text(self.folder / "sweep.json", text)

    def find(self, config_hash: str) -> Job | None:
        """The job with these settings, by their hash."""
        return next((job for job in self.jobs if job.config_hash == config_hash), None)

    def next_number(self) -> int:
        """The number of the next new job."""
        return max((job.number for job in self.jobs), default=-1) + 1

    def add(self, settings: Settings, overrides: dict[str, str], varying: list[str], folder: str | None = None) -> Job:
        """The job with these settings: the one that is there already, or a new one with the next number, in `folder`."""
        config_hash, number = fingerprint.config_hash(settings), self.next_number()
        if job := self.find(config_hash):
            return job
        folder = folder or f"{number}_{make_label(overrides, varying)}"
        differs = {key: pair["value"] for key, pair in fingerprint.differs_from(settings, Settings()).items()}
        self.jobs.append(Job(number, folder, config_hash, overrides, differs))
        return self.jobs[-1]

    def reconcile(self) -> None:
        """Bring the jobs to what their run folders say: a command that was killed could not write it here."""
        for job in self.jobs:
            run = read_run(self.folder / job.folder)
            if run.get("config_hash") == job.config_hash:
                job.status, job.reason = judge(run)
            elif job.status in DONE:
                job.status, job.reason = WAITING, "its run folder is gone"
            elif job.status == RUNNING:
                job.status, job.reason = STOPPED, "cut off: the command was killed"


def load_index(folder: Path) -> SweepIndex | None:
    """The index of a sweep folder; None where it has none. Keys that it does not know are left out.

    Raises Refusal if sweep.json is not what a sweep writes, or a job's folder is not one name inside the sweep's.
    """
    path = folder / "sweep.json"
    content = read_json(path)
    if not content:
        return None
    odd: list[str] = []
    content = fit({key: value for key, value in content.items() if key in SWEEP}, SWEEP, odd)
    jobs = [{key: value for key, value in job.items() if key in JOB and value is not None} for job in content.get("jobs") or []]
    odd += [f"jobs[{i}] without {key}" for i, job in enumerate(jobs) for key in NEEDED if key not in job]
    odd += [f"jobs[{i}].overrides" for i, job in enumerate(jobs) if None in job.get("overrides", {}).values()]
    odd += [f"jobs[{i}].folder" for i, job in enumerate(jobs) if not _is_inside(folder, job.get("folder"))]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        why = f"It is not what a sweep writes: {', '.join(odd[:3])}{more}. A job's folder is one name inside the sweep's."
        raise refuse(str(path), why, f"mend the file, or remove {path} to begin the sweep anew")
    return SweepIndex(**{**content, "folder": folder, "jobs": [Job(**job) for job in jobs]})


def readable_index(folder: Path) -> SweepIndex | None:
    """The index of a sweep that nobody named; one that cannot be read is left out, with a warning."""
    try:
        return load_index(folder)
    except Refusal as refusal:
        log.warning("%s is left out: %s", refusal.problems[0].what, refusal.problems[0].why)
        return None


def _is_inside(sweep: Path, name: Any) -> bool:
    """Whether a job's folder is one name inside the sweep's, and no link out of it."""
    return isinstance(name, str) and is_name(name) and not (sweep / name).is_symlink()


def is_name(text: str) -> bool:
    """Whether a text can be the name of a folder inside another."""
    return text not in ("", ".", "..") and not set(text) & {"/", "\\", "\0"} and len(text.encode()) <= 255


def without_number(folder: str) -> str:
    """The name of a job's folder without the number that it begins with."""
    return re.sub(r"^\d+_", "", folder)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a job's folder; {} where there is none."""
    return read_json(folder / "run.json")


def judge(run: dict[str, Any]) -> tuple[str, str | None]:
    """(status, reason) of a run by its run.json: its own, or diverged where its loss is no number."""
    status, reason, metrics = run.get("status"), run.get("reason"), run.get("metrics", {})
    method = facts_of(run)
    ranked = bool(run.get("data", {}).get("eval_rows"))
    if status == FINISHED and number(metrics.get(method.metric if ranked else "loss")) is None:
        return DIVERGED, f"diverged: the {method.title} is not a number" if ranked else "diverged: the loss is no number"
    settings = run.get("settings")
    trainer = settings.get("trainer") if isinstance(settings, dict) else None
    allowed = number(trainer.get("max_bad_steps")) if isinstance(trainer, dict) else None
    if status == FAILED and allowed is not None and (metrics.get("bad_steps") or 0) > allowed:
        return DIVERGED, reason
    if status in (FINISHED, FAILED, STOPPED):
        return status, reason
    return STOPPED, "cut off: the command was killed"


# ------------------------------------------------------------------------------------------ one sweep, found again


def identify(settings: Settings, swept: list[str]) -> str:
    """Hash of what the jobs of a sweep share: their settings without the swept ones, and which those are.

    The swept values are left out, so that a grid with one more value is still the same sweep.
    """
    shaping = {k: v for k, v in jsonio.jsonable(settings).items() if k not in ("tracking", "sweep")}
    fixed = flatten(fingerprint.as_recorded(shaping))
    for key in swept:
        free = ("",) if key in ("experiment", "sweep") else (f"{key}.",) if key in GROUPS else ()
        fixed = {k: v for k, v in fixed.items() if k != key and not k.startswith(free or ("\0",))}
    return hashlib.sha256(json.dumps([fixed, sorted(swept)], sort_keys=True).encode()).hexdigest()[:16]


def find_sweeps(parent: Path) -> list[Path]:
    """The sweep folders below `parent`, the newest first. Their names begin with the time they were made."""
    return sorted((path.parent for path in parent.glob("*/sweep.json")), key=lambda p: p.name, reverse=True)


class SweepLock:
    """A sweep folder that this process alone works in. The lock ends with the process, however that ends."""

    def __init__(self, folder: Path):
        self.folder, self._file = folder, None

    def take(self) -> bool:
        """Whether the folder is ours now; False while another process runs the sweep."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the sweep runs
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return True

    def release(self) -> None:
        """Let others have the folder before this process ends."""
        if self._file:
            self._file.close()

    def owner(self) -> str:
        """Process id of whoever holds the lock, or ?."""
        try:
            return (self.folder / ".lock").read_text(encoding="utf-8") or "?"
        except OSError:
            return "?"


# -------------------------------------------------------------------------------------------------- names of jobs


def make_label(overrides: dict[str, str], varying: list[str]) -> str:
    """What varies in a job as short `key=value` words: no slashes or commas, at most 60 characters."""
    last = [key.rsplit(".", 1)[-1] for key in varying]
    words = []
    for key in varying:
        short = key.rsplit(".", 1)[-1]
        if key in overrides:
            words.append(f"{short if last.count(short) == 1 else key}={overrides[key]}")
    return re.sub(r"[^\w.=+-]+", "-", "_".join(words)).strip("-")[:60] or "job"
