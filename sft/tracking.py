"""Weights & Biases beside the run folder: its life-cycle, curves and sample table. A tracker never ends a run."""

import contextlib
import logging
import netrc
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft.runtime import jsonable
from sft.settings import Settings, Tracker, TrackingMode

log = logging.getLogger(__name__)

SAMPLE_COLUMNS = ["step", "prompt", "base answer", "answer", "finish", "reference"]


class Tracking:
    """One W&B run, or nothing. Every call is safe: after a failure the tracker is switched off with one warning."""

    def __init__(self) -> None:
        self.run: Any = None
        self.facts: dict[str, Any] = {"mode": "none", "url": None, "sync": None}
        self.lines = 0
        """How many lines W&B was given: its own step, which a resumed run takes up again."""
        self._table: Any = None
        self._base: dict[int, str] = {}

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict | None = None) -> None:
        """Begin the W&B run of this job; nothing happens with `tracking=none`.

        `before` are the facts of the same job's W&B run that was cut: it goes on under the same id. Offline that is a
        further folder with the same id, which `wandb sync --append` puts behind the first.
        """
        if settings.tracking.tracker == Tracker.none:
            return
        mode = choose_mode(settings.tracking.mode)
        before = before if before and before.get("id") else None
        with self._guarded("start"):
            import wandb

            self.run = wandb.init(
                id=before["id"] if before else None,
                resume="allow" if before else None,
                mode=mode,
                dir=folder,
                project=settings.tracking.project,
                entity=settings.tracking.entity,
                name=settings.tracking.name or name,
                tags=[tag[:64] for tag in dict.fromkeys([*tags, *settings.tracking.tags])],
                config=jsonable(settings),
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=60),
            )
            self.run.define_metric("*", step_metric="step")
            files = Path(self.run.dir).parent
            self.facts = {"mode": mode, "url": None, "sync": None, "id": self.run.id}
            if mode == "offline":
                every = files if not before else files.parent / f"offline-run-*-{self.run.id}"
                self.facts["sync"] = f"wandb sync {_short(every)}"
                log.info(
                    "W&B    offline. Look at it: wandb leet run %s   upload it: wandb sync %s", _short(files), _short(every)
                )
            else:
                self.facts["url"] = self.run.url
                log.info("W&B    %s", self.run.url)

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        with self._guarded("log metrics"):
            self._log(dict(metrics))

    def samples(self, lines: list[dict]) -> None:
        """Add generations to the sample table, each with the base model's answer beside it."""
        with self._guarded("log samples"):
            if self.run is None or not lines:
                self.lines += bool(lines)
                return
            import wandb

            self.remember(lines)
            if self._table is None:
                self._table = wandb.Table(columns=SAMPLE_COLUMNS, log_mode="INCREMENTAL")
            for line in lines:
                base = self._base[line["index"]]
                self._table.add_data(line["step"], line["prompt"], base, line["completion"], line["finish"], line["reference"])
            self._log({"step": lines[0]["step"], "samples": self._table})

    def remember(self, lines: list[dict]) -> None:
        """Note the base model's answers, which stand beside the later ones: the first line of each prompt."""
        for line in lines:
            self._base.setdefault(line["index"], line["completion"])

    def _log(self, entry: dict[str, Any]) -> None:
        """Pass a line on under its number, so that W&B leaves out what it has already from before a resume."""
        if self.run is not None:
            self.run.log(entry, step=self.lines, commit=True)
        self.lines += 1

    def finish(self, status: str, metrics: dict[str, Any]) -> None:
        """Write the final metrics as the summary and end the W&B run with the run's own status."""
        run, exit_code = self.run, 1 if status == "failed" else 0
        with self._guarded("finish"):
            if run is not None:
                run.summary.update({**jsonable(metrics), "status": status})
                run.finish(exit_code=exit_code)
        self.run = None

    @contextlib.contextmanager
    def _guarded(self, action: str):
        try:
            yield
        except Exception as error:  # whatever goes wrong in the tracker, the run goes on
            log.warning("W&B could not %s (%s); the run goes on and its folder has everything.", action, error)
            self.run = None


def choose_mode(mode: TrackingMode) -> str:
    """`online` or `offline`: as set, or online where there is a key and the server accepts a connection."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return "offline"
    if mode != TrackingMode.auto:
        return mode.value
    return "online" if has_api_key() and _server_reachable() else "offline"


def has_api_key() -> bool:
    """Whether W&B can log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(_server()).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _server_reachable(timeout: float = 3.0) -> bool:
    url = urlsplit(_server())
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout):
            return True
    except OSError:
        return False


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
