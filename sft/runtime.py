"""Around a run: quiet environment, seeds, the record in run.json, interruption, memory and where it ran."""

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft.durable import drop_link, sync_file
from sft.embedded import cache_dir
from sft.paths import ROOT
from sft.printable import shown, without_passwords
from sft.settings import Settings
from sft.threads import spin_briefly

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "unsloth", "unsloth_zoo",
            "bitsandbytes", "hydra-core", "omegaconf", "wandb", "huggingface_hub")  # fmt: skip


def safe(text: str) -> str:
    """A text for the terminal or the log: no control characters, no password of an address."""
    return without_passwords(shown(text))


class ConsoleHandler(logging.StreamHandler):
    """Writes to stderr through tqdm, so that a line does not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with contextlib.suppress(ValueError, OSError):  # a closed terminal must not end a run
            tqdm.write(safe(mark + self.format(record)), file=sys.stderr)


class LogFile(logging.FileHandler):
    """train.log. A line that the disk does not take is lost in silence: the run says itself what is wrong with the disk."""

    def _open(self) -> Any:
        drop_link(Path(self.baseFilename))
        return super()._open()

    def format(self, record: logging.LogRecord) -> str:
        """The line as a terminal may show it: `cat` and `tail -f` would send on what rows and file names hold."""
        return safe(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing, in place of a traceback a line on the terminal."""


# ------------------------------------------------------------------------------------------ before the imports


def prepare_environment() -> None:
    """Set what the libraries read when they are imported: no telemetry, no caches in the working folder.

    A value that the user has set stays.
    """
    spin_briefly()
    cache = cache_dir()
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "WANDB_ERROR_REPORTING": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(cache / "unsloth_compiled"),
        "TOKENIZERS_PARALLELISM": "false",  # tokenising happens before anything forks
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_SILENT": "true",
    }.items():
        os.environ.setdefault(name, value)
    if not hub_reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else every look-up is tried again and again, for half a minute
    for name in ("datasets", "trl", "peft", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub (or the mirror in HF_ENDPOINT) accepts a connection within `timeout` seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout):
            return True
    except OSError:
        return False


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and info lines out of the run's output. Call after importing the backend."""
    import datasets
    import transformers

    # PEFT's about an adapter on tied embeddings: they are saved whole, and sft/export/merge.py parts them.
    tied = (
        "Model (has|with) `tie_word_embeddings",
        "Input and output embeddings are no longer tied",
        "Setting `save_embedding_l",
    )
    for told in tied:
        warnings.filterwarnings("ignore", told)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


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
            seconds = self.facts["seconds"] = self.facts.get("seconds") or {}
            seconds[part] = round((seconds.get(part) or 0.0) + time.monotonic() - start, 2)


class NoRecord(RunRecord):
    """The same for a process that writes nothing."""

    def __init__(self) -> None:
        self.facts = {}

    def update(self, **facts: Any) -> None:
        """Keep the facts."""
        self.facts |= facts


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is the old one or the whole new one, also after a power cut."""
    write_text(path, json.dumps(jsonable(content), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is the old one or the whole new one, also after a power cut.

    Half a character, as JSON can hold one, becomes `?`.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_file(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def append_jsonl(path: Path, entry: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file."""
    drop_link(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(jsonable(entry), ensure_ascii=False, allow_nan=False) + "\n")


def jsonable(value: Any) -> Any:
    """Plain JSON values: enums by their value, paths as text, numbers that JSON lacks as null."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [jsonable(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def now() -> str:
    """The time now, UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def row_seed(settings: Settings) -> int:
    """The seed that shuffles the rows and so decides which are held out."""
    return settings.seed if settings.dataset.seed is None else settings.dataset.seed


AROUND = ("tracking", "resume", "export", "sweep", "preflight", "distributed")
"""Settings that do not shape the result."""
LIMITS = ("max_hours", "stop_at", "max_bad_steps", "max_memory_gib")
"""Of those of the trainer."""


def config_hash(settings: Settings) -> str:
    """Hash of the resolved settings that shape the result: not tracking, limits, exports, checks, sweeps, processes."""
    shaping = {k: v for k, v in jsonable(settings).items() if k not in AROUND}
    shaping["dataset"]["seed"] = row_seed(settings)
    shaping["trainer"] = {k: v for k, v in shaping["trainer"].items() if k not in LIMITS}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


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


def environment() -> dict[str, Any]:
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
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=5)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "") if commit.returncode == 0 else None


# --------------------------------------------------------------------------------------- seeds, memory, signals


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    from transformers import set_seed

    set_seed(seed)


def peak_memory_gib() -> float:
    """Most memory the run has held so far in GiB: of the GPU as torch reserved it, else of the process."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_reserved() / 2**30, 3)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**30 if sys.platform == "darwin" else peak / 2**20, 3)


def peak_allocated_gib() -> float | None:
    """Most GPU memory that tensors held at one time so far, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 3) if torch.cuda.is_available() else None


def release_memory() -> None:
    """Give back what a finished job no longer needs, so that the next one in this process has it."""
    import gc

    gc.collect()
    with contextlib.suppress(
        AttributeError, OSError, TypeError
    ):  # only glibc has it: pages that are free go back to the system
        ctypes.CDLL(None).malloc_trim(0)
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Interrupted(KeyboardInterrupt):
    """An evaluation or an answer is given up because the run has to stop."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks a run to stop: Ctrl-C, SIGTERM, and SIGHUP (a lost ssh session) where it is not ignored, as under nohup."""
    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hang_up)


class StopRequest:
    """Ctrl-C, SIGTERM and SIGHUP: while training, the first one asks for a clean stop after the step; else they interrupt."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.training = False
        """Whether a stop can be a clean one: from the first step until the run is recorded."""
        self.out_of_time = False
        self.failure: str | None = None
        """Why training cannot go on, where it ends by itself."""

    @property
    def wanted(self) -> bool:
        """Whether training has to end after this step."""
        return bool(self.signal or self.out_of_time or self.failure)

    def check(self) -> None:
        """Raise Interrupted if a signal came: for the middle of what can be done again later."""
        self.check_here()

    def check_here(self) -> None:
        """The same, asked by this process alone where there are several."""
        if self.signal:
            raise Interrupted(self.signal)

    def agree(self) -> None:
        """Where there are several processes: take over what the first one knows. Asked once a step."""

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals inside the block and restore what handled them before."""
        before = {}
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us handles signals
            before = {s: signal.signal(s, self._receive) for s in stop_signals()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        first = self.signal is None
        if number == signal.SIGHUP and not first:
            return  # a shell that is gone and the terminal behind it each send one
        self.signal = signal.Signals(number).name
        if not (first and self.training):
            raise KeyboardInterrupt(self.signal)
        log.warning("%s: stopping after this step and saving; once more stops at once.", self.signal)
