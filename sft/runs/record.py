"""run.json: what a run is, how it stands and how it ended, rewritten as a whole with each change."""

import contextlib
import logging
import os
import platform
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sft.config.consent import with_word
from sft.config.destinations import code_files
from sft.config.fingerprint import config_hash, differs_from, reward_hashes
from sft.config.method import METHODS
from sft.config.schema import Settings
from sft.paths import INSTALLED, ROOT
from sft.programs import as_called
from sft.storage.jsonio import jsonable, now, write_json

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """How a run ended."""

    status: str
    """`finished`, `stopped` (on request, state saved), `failed` or `refused`; `checked` with `preflight.mode=only`."""
    exit_code: int
    """0 finished, 1 failed, 2 refused before training, 130 interrupted."""
    folder: Path
    metric: float | None = None
    """What the method ranks runs by, of the weights that were kept."""


@dataclass
class Context:
    """What the command line adds to the settings, for the record."""

    name: str = "run"
    command: str = ""
    overrides: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    """Where the value of each setting comes from."""
    choices: dict[str, str] = field(default_factory=dict)
    """The option that was chosen of each group: {"lora": "r32"}."""
    logging: dict[str, Any] | None = None
    """Hydra's logging of this job, for the process that a run of several ones speaks through."""


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "unsloth", "unsloth_zoo",
            "bitsandbytes", "hydra-core", "omegaconf", "wandb", "huggingface_hub")  # fmt: skip


# ------------------------------------------------------------------------------------------------- the record


class RunRecord:
    """The facts of a run, rewritten atomically to run.json at each `update`."""

    def __init__(self, folder: Path, before: dict[str, Any] | None = None, **facts: Any):
        """Begin a record, or go on with the one that was `before`: its facts stay, and its seconds are added to."""
        self.path = folder / "run.json"
        before = {k: v for k, v in (before or {}).items() if k not in ("error", "metrics")}
        self.facts: dict[str, Any] = {**before, "status": "running", "reason": None, **facts}
        self._started = time.monotonic() - ((before.get("seconds") or {}).get("total") or 0.0)
        self.update(started_at=before.get("started_at") or now(), ended_at=None)

    def update(self, **facts: Any) -> None:
        """Add or replace facts and write the file."""
        self.facts |= facts
        write_json(self.path, self.facts)

    def close(self, status: str, reason: str | None = None, **facts: Any) -> None:
        """Write the final status, last of all that the run writes."""
        seconds = {**(self.facts.get("seconds") or {}), "total": round(time.monotonic() - self._started, 2)}
        self.update(**facts, seconds=seconds, ended_at=now(), reason=reason, status=status)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Record how many seconds a part of the run took."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self.facts["seconds"] = {**(self.facts.get("seconds") or {})}  # those of an earlier session stay theirs
            seconds[part] = round((seconds.get(part) or 0.0) + time.monotonic() - start, 2)


def start_record(settings: Settings, folder: Path, context: Context, before: dict | None) -> RunRecord:
    """Write run.json before anything that takes time, so that a run which is killed can be told from an empty folder."""
    if before:
        return RunRecord(folder, before)
    return RunRecord(
        folder,
        name=context.name,
        command=context.command,
        overrides=list(context.overrides),
        working_folder=os.getcwd(),
        tags=list(context.tags),
        choices=dict(context.choices),
        config_hash=config_hash(settings),
        **({"reward_files": files} if (files := reward_hashes(settings)) else {}),
        seed=settings.seed,
        settings=jsonable(settings),
        differs_from_defaults=differs_from(settings, Settings()),
    )


def _keep_code(record: RunRecord, settings: Settings) -> None:
    """Copy the files of the user's own that the run has run into code/ of its folder: they may change afterwards."""
    folder = record.path.parent / "code"
    files = code_files(settings)
    for file in files:
        alone = [one.name for one in files].count(file.name) == 1
        kept = folder / (file.name if alone else str(file).strip("/").replace("/", "_"))
        if not kept.exists():
            folder.mkdir(exist_ok=True)
            part = folder / f".{kept.name}.part"  # a copy that is cut must not pass for the file
            shutil.copy(file, part)
            part.replace(kept)


def record_session(record: RunRecord, settings: Settings, facts: dict, checkpoint: Path | None) -> None:
    """Note the data, keep copies of the user's own code, and note that the run begins or goes on here."""
    _keep_code(record, settings)
    rows = facts["rows"]
    sessions = [*(record.facts.get("sessions") or []), {"started_at": now(), "from": checkpoint and checkpoint.name}]
    record.update(
        data={
            "source": facts["source"],
            "hash": facts["data_hash"],
            "held_out_hash": facts.get("held_out_hash"),
            "train_rows": rows["train"],
            "eval_rows": rows.get("eval", 0),
            "train_tokens": facts["train_tokens"],
            "eval_tokens": facts.get("eval_tokens", 0),
            **{key: facts[key] for key in ("files", "eval_source") if key in facts},
        },
        sessions=sessions,
        **({"start_from": facts["start_from"]} if facts.get("start_from") else {}),
        **machine_facts(),
    )


class NoRecord(RunRecord):
    """The same for a process that writes nothing."""

    def __init__(self) -> None:
        self.facts = {}

    def update(self, **facts: Any) -> None:
        """Keep the facts."""
        self.facts |= facts


def machine_facts() -> dict[str, Any]:
    """Versions, hardware and commit of this machine, for the record. Call after torch is imported."""
    import psutil
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    hardware = {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        if torch.cuda.is_available()
        else None,
        "platform": platform.platform(),
    }
    return {"versions": versions, "hardware": hardware, "place": _place(), "git_commit": _git_commit()}


def _place() -> dict[str, str]:
    """Where the run is: the host, and what a cluster gave it."""
    given = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID") if os.environ.get(name)}
    return {"host": socket.gethostname(), **given}


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the checkout this code runs from, with `+` where it was changed since; None outside a checkout."""
    if INSTALLED:
        return None  # a repository around it is the user's
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=5)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "") if commit.returncode == 0 else None


def log_ending(settings: Settings, folder: Path, facts: dict[str, Any]) -> None:
    """Say how a run ended, what it left, and how it goes on."""
    status, reason, metrics = facts["status"], facts["reason"], facts.get("metrics") or {}
    method = METHODS[settings.method.name.value]
    end, start = metrics.get(method.metric), metrics.get(f"{method.metric}_start")
    if end is not None and start is not None:
        log.info("Done   %s: %s %.4f -> %.4f", status, method.title, start, end)
    else:
        log.info("Done   %s%s", status, f": {reason}" if reason else "")
    if status == "stopped":
        log.info("       go on with: %s", with_word(as_called(f"python train.py resume={os.path.relpath(folder)}"), settings))
    for name, place in facts["artifacts"].items():
        log.info("       %-8s %s", name, os.path.relpath(folder / place))
    if status == "finished" and {"adapter", "model"} & facts["artifacts"].keys():
        command = as_called(f"python scripts/chat.py run={shlex.quote(os.path.relpath(folder))}")
        log.info("       talk     %s", with_word(command, settings))
