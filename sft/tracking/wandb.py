"""Weights & Biases beside the run folder: its life-cycle, curves and sample table."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft.config.method import METHODS
from sft.config.schema import Settings, TrackingMode, TrackingSettings
from sft.errors import first_line, refuse
from sft.paths import expanded
from sft.programs import as_called
from sft.storage.jsonio import jsonable
from sft.tracking.names import AXIS, PROJECT, SAMPLES, TOKENS, Tokens, define_metrics, name_metrics, sample_rows
from sft.tracking.server import takes_connection

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 300
"""How long the end of a run waits for W&B to take the rest, unless WANDB_FINISH_TIMEOUT says otherwise."""


def make_tracker() -> "WandbTracker":
    """The tracker of `tracking=wandb`."""
    return WandbTracker()


def check(tracking: TrackingSettings) -> str:
    """Where a run will be tracked. Raises Refusal where it cannot be online as set."""
    mode, why = choose_mode(tracking.mode)
    entity, project = place(tracking)
    project = f"project {entity}/{project}" if entity else f"project {project}"
    requested = asks_online(tracking.mode)
    if mode == "online" and requested and (why := ask_server()):
        mode = "offline"
    if mode == "online":
        return f"W&B online, {project}"
    if mode == "disabled":
        return f"the run folder alone: W&B is switched off ({why})"
    if requested:
        fix = "wandb login   or   tracking.mode=offline" if "API key" in why else "tracking.mode=offline"
        setting = "tracking.mode=online" if tracking.mode == TrackingMode.online else "WANDB_MODE=online"
        raise refuse(setting, f"W&B cannot be online: {why}.", fix)
    sweep = wandb_settings().sweep_id
    later = f"the W&B sweep {sweep} hears of it once it is uploaded" if sweep else "the run logs how to upload it"
    return f"W&B offline ({why}), {project}; {later}"


class WandbTracker:
    """One W&B run; none where the environment switches W&B off."""

    name = "wandb"

    def __init__(self) -> None:
        self.run: Any = None
        self.facts: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        """What `describe` told: W&B's config beside the settings."""
        self.lines = 0
        """The number of the next line, W&B's own step. W&B takes none twice: a resumed run goes on above those it has."""
        self._open: Callable[[str], None] | None = None
        """Begins the W&B run again in a mode; None once that was done."""
        self._table: Any = None
        self._rollouts: Any = None
        self._settings, self._folder, self._tokens = Settings(), Path(), Tokens(Path())

    def describe(self, facts: dict[str, Any]) -> None:
        """Add facts of the run to W&B's config."""
        self.known |= jsonable(facts)
        if self.run is None:
            return
        try:
            self.run.config.update(jsonable(facts), allow_val_change=True)
        except Exception as error:
            self._go_offline("go on", error)

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
        self._settings, self._folder, self._tokens = settings, folder, Tokens(folder)
        if mode == "offline" and asks_online(settings.tracking.mode):
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
        from wandb.sdk.lib.runid import generate_id

        own, tracking = wandb_settings(), settings.tracking
        entity, project = place(tracking, before)
        tags = [*tags, *(own.run_tags or ()), *tracking.tags]
        number = before.get("id") or own.run_id or generate_id()
        shown = tracking.name or own.run_name or f"{name}_{number}"
        known_there = mode == "online" and before.get("mode") == "online"
        self.run = wandb.init(
            id=number,
            resume="allow" if before else None,
            mode=mode,
            dir=folder,
            project=project,
            entity=entity,
            name=None if known_there else shown[:128],  # there somebody may have renamed it
            notes=None if known_there else tracking.notes or own.run_notes or (self.known.get("run") or {}).get("command"),
            group=tracking.group or own.run_group,
            job_type=own.run_job_type or "train",
            tags=[tag[:64] for tag in dict.fromkeys(tags)],
            config={**jsonable(settings), **self.known},
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                init_timeout=60,
                finish_timeout=own.finish_timeout or UPLOAD_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        define_metrics(self.run, METHODS[settings.method.name.value])
        self.lines, self._table = max(self.lines, self.run.step, self.run.starting_step), None
        self._rollouts = None
        again, files = bool(before), Path(self.run.dir).parent
        # Which it keeps if it has to begin again.
        before |= {"id": self.run.id, "project": project, "entity": entity, "group": self.run.group or None}
        # An earlier part of the run may still wait to be uploaded.
        self.facts = {"url": None, "sync": None, **before, "mode": mode, "lines": self.lines}
        if mode == "offline":
            every = files.parent / f"*run-*-{self.run.id}" if again else files
            self.facts["sync"] = f"wandb sync {_short(every)}"
            look, upload = as_called(f"wandb leet run {_short(files)}"), as_called(f"wandb sync {_short(every)}")
            log.info("W&B    offline. Look at it: %s   upload it: %s", look, upload)
        else:
            self.facts["url"] = self.run.url
            log.info("W&B    %s", self.run.url)

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        self._log(lambda: name_metrics(metrics, self._tokens.at(metrics)))

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Add generations to the sample table; the first of each prompt among all of the run stands beside the later ones."""
        at = {AXIS: lines[0]["step"], TOKENS: self._tokens.at({})}
        self._log(lambda: {**at, "samples": self._fill(lines, earlier)})

    def _fill(self, lines: list[dict], earlier: list[dict]) -> Any:
        """The table with `lines` in it: a new one has the earlier ones too, where W&B does not bring them itself."""
        import wandb

        missing = []
        if self._table is None:
            self._table = wandb.Table(columns=[*SAMPLES], log_mode="INCREMENTAL")
            missing = [] if self.run.resumed else earlier
        for row in sample_rows([*missing, *lines], earlier):
            self._table.add_data(*row)
        return self._table

    def log_rollouts(self, step: int, columns: list[str], rows: list[list[Any]], earlier: list[list[Any]]) -> None:
        """Add rows to the table of rollouts; a new one has the earlier ones too, where W&B does not bring them itself."""
        import wandb

        def fill() -> dict[str, Any]:
            missing = []
            if self._rollouts is None:
                self._rollouts = wandb.Table(columns=columns, log_mode="INCREMENTAL")
                missing = [] if self.run.resumed else earlier
            for row in [*missing, *rows]:
                self._rollouts.add_data(*row)
            return {AXIS: step, TOKENS: self._tokens.at({}), "rollouts": self._rollouts}

        self._log(fill)

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
        if isinstance(error, ConnectionError):
            _forget_service()
        again("offline")

    def finish(self, status: str, metrics: dict[str, Any], reason: str | None = None) -> None:
        """Write the final metrics, status and reason as the summary, and end the W&B run with the run's own status."""
        run, self.run = self.run, None
        if run is None:
            return
        why = reason.strip().splitlines()[0] if reason and reason.strip() else None
        try:
            run.summary.update({**jsonable(metrics), "status": status, "reason": why})
            if self._settings.tracking.log_adapter and status != "failed":
                try:
                    self._log_adapter(run, metrics)
                except Exception as error:
                    log.warning("W&B did not take the adapter (%s); it is in %s.", first_line(error), _short(self._folder))
            if self._settings.tracking.alert:
                level = {"failed": "ERROR", "stopped": "WARN"}.get(status, "INFO")
                run.alert(title=f"{run.name or run.id}: {status}"[:63], text=why or self._shown(metrics), level=level)
        finally:
            self._close(run, 1 if status == "failed" else 0)

    def _shown(self, metrics: dict[str, Any]) -> str:
        """What the method ranks runs by, before and after, for an alert."""
        method = METHODS[self._settings.method.name.value]
        start, end = metrics.get(f"{method.metric}_start"), metrics.get(method.metric)
        return f"{method.title} {start:.4f} -> {end:.4f}" if start is not None and end is not None else f"no {method.title}"

    def _close(self, run: Any, code: int) -> None:
        """End the W&B run; where the server does not take the rest in time, say how it is uploaded later."""
        folder = _short(Path(run.dir).parent)
        try:
            run.finish(exit_code=code)
        except Exception as error:
            if not isinstance(error, TimeoutError):
                _forget_service()
            if self.facts.get("mode") != "online":
                raise
            self.facts["sync"] = f"wandb sync {folder}"
            why = first_line(error)
            upload = as_called(f"wandb sync {folder}")
            log.warning("W&B's server did not take all of the run (%s). Upload it later: %s", why, upload)

    def _log_adapter(self, run: Any, metrics: dict[str, Any]) -> None:
        """Send the adapter as an artifact; its files stay where they are until then."""
        import wandb

        folder = self._folder / "adapter"
        if not folder.is_dir():
            return
        facts = {key: value for key, value in jsonable(metrics).items() if isinstance(value, int | float)}
        metadata = {**facts, "base_model": self._settings.model.name, "run_folder": str(self._folder.absolute())}
        artifact = wandb.Artifact(f"adapter-{run.id}", type="model", metadata=metadata)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            artifact.add_file(str(file), file.relative_to(folder).as_posix(), skip_cache=True, policy="immutable")
        run.log_artifact(artifact, aliases=["latest", "best"])

    def state(self) -> dict[str, Any]:
        """Its mode, address and id, and the project that it goes on in."""
        return dict(self.facts)


def _forget_service() -> None:
    """W&B's own process is gone; without this a new run, or the end of this process, would ask for that one."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def wandb_settings() -> Any:
    """What W&B itself goes by, from its settings files and the environment. Raises Refusal where it refuses that."""
    try:
        from wandb.sdk.wandb_settings import Settings as Own

        own = Own(silent=True)
        place = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
        own.settings_system = str(expanded(place) / "settings")
        own.update_from_system_settings()
        own.update_from_env_vars(os.environ)
    except ImportError as error:
        raise refuse("tracking=wandb", first_line(error), "pip install -e .   or   tracking=none") from error
    except Exception as error:  # its own UsageError, and pydantic's
        fault = error.errors()[0] if hasattr(error, "errors") else {}
        why = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault else str(error)
        fix = "correct that WANDB_... variable   or   tracking=none"
        team, slash, project = os.environ.get("WANDB_PROJECT", "").partition("/")
        if "project name" in why and slash and "/" not in project:
            fix = f"export WANDB_ENTITY={team} WANDB_PROJECT={project}   or   tracking=none"
        raise refuse("tracking=wandb", f"W&B refuses its own settings: {why}", fix) from error
    return own


def place(tracking: TrackingSettings, before: dict | None = None) -> tuple[str | None, str]:
    """(entity, project) of a run: as set, as it began, as W&B's own settings say, else the account's default and `sft`."""
    own, before = wandb_settings(), before or {}
    entity = tracking.entity or before.get("entity") or own.entity
    return entity, tracking.project or before.get("project") or own.project or PROJECT


def asks_online(mode: TrackingMode) -> bool:
    """Whether it was said that a run has to be online, here or in the environment."""
    return mode == TrackingMode.online or (mode == TrackingMode.auto and os.environ.get("WANDB_MODE") == "online")


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
    return bool(wandb_settings().identity_token_file or _api_key())


def _api_key() -> str | None:
    own = wandb_settings()
    if own.api_key:
        return own.api_key
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import read_netrc_auth

    with contextlib.suppress(AuthenticationError):
        return read_netrc_auth(host=own.base_url)
    return None


def ask_server(timeout: float = 5.0) -> str | None:
    """Why the server takes no run of this user; None where it knows the key, or cannot be asked in this way."""
    import requests

    own, key = wandb_settings(), _api_key()
    if not key or own.identity_token_file:
        return None
    proxies = {scheme: proxy for scheme in ("http", "https") if (proxy := getattr(own, f"{scheme}_proxy"))}
    question = {"query": "query Viewer { viewer { id } }"}
    try:
        answer = requests.post(f"{own.base_url}/graphql", json=question, auth=("api", key), timeout=timeout, proxies=proxies)
        known = answer.status_code == 200 and (answer.json().get("data") or {}).get("viewer")
    except requests.exceptions.SSLError:
        return None  # which certificates count is W&B's own affair
    except (requests.RequestException, ValueError, AttributeError):
        return f"{own.base_url} does not answer as a W&B server"
    if known:
        return None
    refused = answer.status_code in (200, 401, 403)
    return f"{own.base_url} does not know the API key" if refused else f"{own.base_url} answers {answer.status_code}"


def _reachable(server: str) -> bool:
    """Whether the server takes a connection, or the proxy that W&B has for it."""
    return takes_connection(server, getattr(wandb_settings(), f"{urlsplit(server).scheme}_proxy"))


def _lines_in(folder: Path) -> int:
    """Lines that a run wrote down before it was cut: W&B had no more of them since the session began."""
    return sum(_count_lines(folder / name) for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"))


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
