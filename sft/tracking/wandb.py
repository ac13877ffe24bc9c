"""Weights & Biases beside the run folder: its life-cycle, curves and sample table."""

import contextlib
import logging
import os
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft.config.schema import Settings, TrackingMode, TrackingSettings
from sft.errors import first_line, refuse
from sft.storage.jsonio import jsonable

log = logging.getLogger(__name__)

SAMPLE_COLUMNS = ["step", "prompt", "base answer", "answer", "finish", "reference"]

PROJECT = "sft"
"""Where neither `tracking.project` nor W&B's own settings name one."""


def make_tracker() -> "WandbTracker":
    """The tracker of `tracking=wandb`."""
    return WandbTracker()


def check(tracking: TrackingSettings) -> str:
    """Where a run will be tracked. Raises Refusal where it cannot be online as set."""
    mode, why = choose_mode(tracking.mode)
    entity, project = place(tracking)
    project = f"project {entity}/{project}" if entity else f"project {project}"
    if mode == "online":
        return f"W&B online, {project}"
    if mode == "disabled":
        return f"the run folder alone: W&B is switched off ({why})"
    if tracking.mode == TrackingMode.online:
        fix = "wandb login   or   tracking.mode=offline" if not has_api_key() else "tracking.mode=offline"
        raise refuse("tracking.mode=online", f"W&B cannot be online: {why}.", fix)
    return f"W&B offline ({why}), {project}; the run logs how to upload it"


class WandbTracker:
    """One W&B run; none where the environment switches W&B off."""

    name = "wandb"

    def __init__(self) -> None:
        self.run: Any = None
        self.facts: dict[str, Any] = {}
        self.lines = 0
        """The number of the next line, W&B's own step. W&B takes none twice: a resumed run goes on above those it has."""
        self._open: Callable[[str], None] | None = None
        """Begins the W&B run again in a mode; None once that was done."""
        self._table: Any = None

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict[str, Any]) -> None:
        """Begin the W&B run of this job; nothing happens where the environment switches W&B off.

        A job that was cut goes on under the same id. Offline that is a further folder with the same id. An online run that
        cannot begin becomes an offline one.
        """
        mode, why = choose_mode(settings.tracking.mode)
        if mode == "disabled":
            self.facts["mode"] = mode
            log.info("W&B    switched off (%s)", why)
            return
        if mode == "offline" and settings.tracking.mode == TrackingMode.online:
            log.warning("tracking.mode=online cannot be had (%s): W&B is offline.", why)
        before = dict(before) if before.get("id") else {}
        before.pop("entity", None)  # the team is set by settings alone, which sft/config/destinations.py vouches for
        self.lines = before.get("lines", 0) + _lines_in(folder) if before else 0
        self._open = lambda mode: self._begin(settings, folder, name, tags, before, mode)
        try:
            self._open(mode)
        except Exception as error:
            if mode != "online":
                raise
            self._go_offline("start", error)

    def _begin(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict, mode: str) -> None:
        import wandb

        own = wandb_settings()
        entity, project = place(settings.tracking, before)
        tags = [*tags, *(own.run_tags or ()), *settings.tracking.tags]
        self.run = wandb.init(
            id=before.get("id"),
            resume="allow" if before else None,
            mode=mode,
            dir=folder,
            project=project,
            entity=entity,
            name=settings.tracking.name or own.run_name or name,
            tags=[tag[:64] for tag in dict.fromkeys(tags)],
            config=jsonable(settings),
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=60),
        )
        self.run.define_metric("*", step_metric="step")
        self.lines, self._table = max(self.lines, self.run.step), None
        again, files = bool(before), Path(self.run.dir).parent
        before |= {"id": self.run.id, "project": project, "entity": entity}  # which it keeps if it has to begin again
        self.facts = {"mode": mode, "url": None, "sync": None, **before, "lines": self.lines}
        if mode == "offline":
            every = files.parent / f"*run-*-{self.run.id}" if again else files
            self.facts["sync"] = f"wandb sync {_short(every)}"
            log.info("W&B    offline. Look at it: wandb leet run %s   upload it: wandb sync %s", _short(files), _short(every))
        else:
            self.facts["url"] = self.run.url
            log.info("W&B    %s", self.run.url)

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        self._log(lambda: dict(metrics))

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Add generations to the sample table; the first of each prompt among all of the run stands beside the later ones."""
        self._log(lambda: {"step": lines[0]["step"], "samples": self._fill(lines, earlier)})

    def _fill(self, lines: list[dict], earlier: list[dict]) -> Any:
        """The table with `lines` in it: a new one has the earlier ones too, where W&B does not bring them itself."""
        import wandb

        base: dict[int, str] = {}
        for line in [*earlier, *lines]:
            base.setdefault(line["index"], line["completion"])
        if self._table is None:
            self._table = wandb.Table(columns=SAMPLE_COLUMNS, log_mode="INCREMENTAL")
            lines = lines if self.run.resumed else [*earlier, *lines]
        for line in lines:
            completions = base[line["index"]], line["completion"]
            self._table.add_data(line["step"], line["prompt"], *completions, line["finish"], line["reference"])
        return self._table

    def _log(self, make: Callable[[], dict[str, Any]]) -> None:
        """Pass the line that `make()` gives on under its number; if W&B broke down, to an offline run that goes on with it."""
        if self.run is None:
            return
        try:
            self.run.log(make(), step=self.lines, commit=True)
        except Exception as error:
            self._go_offline("go on", error)
            self.run.log(make(), step=self.lines, commit=True)
        self.lines += 1

    def _go_offline(self, action: str, error: Exception) -> None:
        """Begin again offline, once, so that there is a record."""
        if self._open is None:
            raise error
        log.warning("W&B could not %s (%s): it goes on offline.", action, first_line(error))
        again, self._open, self.run = self._open, None, None
        if isinstance(error, ConnectionError):  # its own process is gone; without this a new run would ask for that one
            import wandb

            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()
        again("offline")

    def finish(self, status: str, metrics: dict[str, Any]) -> None:
        """Write the final metrics as the summary and end the W&B run with the run's own status."""
        run, self.run = self.run, None
        if run is not None:
            run.summary.update({**jsonable(metrics), "status": status})
            run.finish(exit_code=1 if status == "failed" else 0)

    def state(self) -> dict[str, Any]:
        """Its mode, address and id, and the project that it goes on in."""
        return dict(self.facts)


def wandb_settings() -> Any:
    """What W&B itself goes by, from its settings files and the environment. Raises Refusal where it refuses that."""
    try:
        from wandb.sdk.wandb_settings import Settings as Own

        own = Own(silent=True)
        place = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
        own.settings_system = str(place.expanduser() / "settings")
        own.update_from_system_settings()
        own.update_from_env_vars(os.environ)
    except ImportError as error:
        raise refuse("tracking=wandb", first_line(error), "pip install -e .   or   tracking=none") from error
    except Exception as error:  # its own UsageError, and pydantic's
        fault = error.errors()[0] if hasattr(error, "errors") else {}
        why = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault else str(error)
        fix = "correct that WANDB_... variable   or   tracking=none"
        raise refuse("tracking=wandb", f"W&B refuses its own settings: {why}", fix) from error
    return own


def place(tracking: TrackingSettings, before: dict | None = None) -> tuple[str | None, str]:
    """(entity, project) of a run: as set, as it began, as W&B's own settings say, else the account's default and `sft`."""
    own, before = wandb_settings(), before or {}
    entity = tracking.entity or before.get("entity") or own.entity
    return entity, tracking.project or before.get("project") or own.project or PROJECT


def choose_mode(mode: TrackingMode) -> tuple[str, str]:
    """(`online`, `offline` or `disabled`, why not online); what is set counts before WANDB_MODE and WANDB_DISABLED."""
    if mode == TrackingMode.offline:
        return "offline", "as set"
    if mode == TrackingMode.auto:
        own = wandb_settings().mode
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            return "disabled", f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
        if own in ("disabled", "offline", "dryrun"):
            source = f"WANDB_MODE={own}" if os.environ.get("WANDB_MODE") else f"mode = {own} in W&B's settings file"
            return "disabled" if own == "disabled" else "offline", source
    if not has_api_key():
        return "offline", "no API key"
    server = wandb_settings().base_url
    return ("online", "") if _reachable(server) else ("offline", f"{server} takes no connection")


def has_api_key() -> bool:
    """Whether W&B can log in to its server without asking."""
    own = wandb_settings()
    if own.api_key or own.identity_token_file:
        return True
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import read_netrc_auth

    with contextlib.suppress(AuthenticationError):
        return read_netrc_auth(host=own.base_url) is not None
    return False


def _reachable(server: str, timeout: float = 3.0) -> bool:
    """Whether the server, or the proxy before it, takes a connection."""
    url, own = urlsplit(server), wandb_settings()
    proxy = getattr(own, f"{url.scheme}_proxy") or urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout):
            return True
    except OSError:
        return False


def _lines_in(folder: Path) -> int:
    """Lines that a run wrote down before it was cut: W&B had no more of them since the session began."""
    files = [folder / name for name in ("metrics.jsonl", "samples.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in files if path.is_file())


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
