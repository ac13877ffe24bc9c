"""SwanLab: online with its API key, else offline in `<run folder>/swanlab`, to be uploaded later with `swanlab sync`."""

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.config.schema import Settings, TrackingMode, TrackingSettings
from sft.errors import first_line, refuse
from sft.programs import as_called
from sft.storage.jsonio import jsonable
from sft.tracking.names import PROJECT, SAMPLES, Tokens, group_of, lines_before, name_metrics, sample_rows
from sft.tracking.server import takes_connection

log = logging.getLogger(__name__)

START_SECONDS, UPLOAD_SECONDS = 60, 300
"""How long a run waits for SwanLab at its start, and at its end for the rest to be uploaded."""

STATES = {"finished": "success", "stopped": "aborted", "failed": "crashed"}


def make_tracker() -> "SwanlabTracker":
    """The tracker of `tracking=swanlab`."""
    return SwanlabTracker()


def check(tracking: TrackingSettings) -> str:
    """Where a run will be tracked. Raises Refusal where it cannot be online as set."""
    mode, why = choose_mode(tracking.mode)
    if mode == "disabled":
        return f"the run folder alone: SwanLab is switched off ({why})"
    if mode == "offline" and tracking.mode == TrackingMode.online:
        login = "swanlab login   or   " if "API key" in why else ""
        raise refuse("tracking.mode=online", f"SwanLab cannot be online: {why}.", f"{login}tracking.mode=offline")
    project = f"project {_project(tracking)}"
    return f"SwanLab online, {project}" if mode == "online" else f"SwanLab offline ({why}), {project}"


def choose_mode(mode: TrackingMode) -> tuple[str, str]:
    """(`online`, `offline` or `disabled`, why not online); what is set counts before SwanLab's own settings."""
    own = _own_settings()
    if mode == TrackingMode.offline:
        return "offline", "as set"
    if mode == TrackingMode.auto and own.mode != "online":
        return ("disabled" if own.mode == "disabled" else "offline"), f"SwanLab's own mode is {own.mode}"
    if not own.api_key:
        return "offline", "no API key"
    return ("online", "") if takes_connection(own.api_host) else ("offline", f"{own.api_host} takes no connection")


class SwanlabTracker:
    """One SwanLab run; none where its own settings switch SwanLab off."""

    name = "swanlab"

    def __init__(self) -> None:
        self.run: Any = None
        self.facts: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        """SwanLab's config beside the settings."""
        self.last: dict[str, int] = {}
        """The last step of each metric: SwanLab takes none twice."""
        self._folder, self._tokens, self._cut = Path(), Tokens(Path()), {"lines": False, "samples": False, "rollouts": False}
        """Whether the part before a resume is still to be shown: SwanLab's file may lack its end."""

    def describe(self, facts: dict[str, Any]) -> None:
        """Add facts of the run to SwanLab's config."""
        self.known |= jsonable(facts)
        if self.run is not None:
            self.run.config.update(jsonable(facts))

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict[str, Any]) -> None:
        """Begin the run. One that was cut goes on under its id, offline in a further folder that has all of it.

        An online run that cannot begin becomes an offline one.
        """
        tracking, (mode, why) = settings.tracking, choose_mode(settings.tracking.mode)
        self._folder, self._tokens, self._cut = folder, Tokens(folder), dict.fromkeys(self._cut, bool(before.get("id")))
        if mode == "disabled":
            self.facts["mode"] = mode
            log.info("SwanLab switched off (%s)", why)
            return
        notes = tracking.notes or (self.known.get("run") or {}).get("command") or ""
        options = {
            "project": before.get("project") or _project(tracking),
            "workspace": tracking.entity,
            "name": tracking.name or name,
            "description": notes[:1024] or None,
            "group": group_of(tracking),
            "tags": [*dict.fromkeys([*tags, *tracking.tags])],
            "job_type": "train",
            "log_dir": str(folder / "swanlab"),
            "config": {**jsonable(settings), **self.known},
            **({"id": before["id"], "resume": "allow"} if before.get("id") else {}),
        }
        try:
            self._begin(mode, options)
        except Exception as error:
            if mode != "online":
                raise
            log.warning("SwanLab could not start (%s): it goes on offline.", first_line(error))
            self._begin("offline", options)

    def _begin(self, mode: str, options: dict[str, Any]) -> None:
        import swanlab

        quiet = swanlab.Settings(
            interactive=False,
            probe={"requirements": False, "conda": False, "git": False},
            terminal={"proxy_type": "none"},
        )
        hook = sys.excepthook
        self.run = _waited_for(lambda: swanlab.init(mode=mode, settings=quiet, reinit=True, **options), START_SECONDS)
        sys.excepthook = hook
        online, files = mode == "online", os.path.relpath(self.run.dir)
        self.facts = {"mode": mode, "url": self.run.url if online else None, "id": self.run.id}
        self.facts |= {"project": options["project"], "group": options["group"]}
        self.facts["sync"] = None if online else f"swanlab sync --id {self.run.id} {files}"
        log.info("SwanLab %s", self.run.url if online else as_called(f"offline. Upload it: {self.facts['sync']}"))

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        if self.run is None:
            return
        if self._cut["lines"]:
            self._cut["lines"], self._tokens.so_far = False, 0
            for line in lines_before(self._folder):
                self.log(line)
        step, named = metrics["step"], name_metrics(metrics, self._tokens.at(metrics))
        new = {key: value for key, value in named.items() if step > self.last.get(key, -1)}
        self.last |= dict.fromkeys(new, step)
        self.run.log(new, step=step)

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Add a table of the samples of this step, with the first completion of each prompt."""
        if self.run is None:
            return
        import swanlab

        shown = [*(earlier if self._cut["samples"] else []), *lines]
        self._cut["samples"] = False
        for step in dict.fromkeys(line["step"] for line in shown):
            table = swanlab.echarts.Table()
            table.add([*SAMPLES], sample_rows([line for line in shown if line["step"] == step], earlier))
            self.run.log({"samples/table": table}, step=step)

    def log_rollouts(self, step: int, columns: list[str], rows: list[list[Any]], earlier: list[list[Any]]) -> None:
        """Add a table of the rollouts of this step; of those before a resume too, which SwanLab's file may lack."""
        if self.run is None:
            return
        import swanlab

        shown = [*(earlier if self._cut["rollouts"] else []), *rows]
        self._cut["rollouts"] = False
        for at in dict.fromkeys(row[0] for row in shown):
            table = swanlab.echarts.Table()
            table.add(columns, [row for row in shown if row[0] == at])
            self.run.log({"rollouts/table": table}, step=at)

    def finish(self, status: str, metrics: dict[str, Any], reason: str | None) -> None:
        """Write the final metrics, status and reason to the config, and end with the run's own status."""
        run, self.run = self.run, None
        if run is None:
            return
        run.config.update({"final": jsonable(metrics), "status": status, "reason": reason})
        try:
            _waited_for(lambda: run.finish(STATES[status], error=reason if status == "failed" else None), UPLOAD_SECONDS)
        except TimeoutError:
            self.facts["sync"] = f"swanlab sync --id {run.id} {os.path.relpath(run.dir)}"
            log.warning("SwanLab's server did not take all of the run. Upload it later: %s", as_called(self.facts["sync"]))

    def state(self) -> dict[str, Any]:
        """Its mode, address and id."""
        return dict(self.facts)


def _own_settings() -> Any:
    """What SwanLab itself goes by, from its settings files and the environment. Raises Refusal where it refuses that."""
    from swanlab import Settings as Own

    try:
        return Own()
    except ValueError as error:
        why = f"SwanLab refuses its own settings: {first_line(error)}"
        raise refuse("tracking=swanlab", why, "correct that SWANLAB_... variable   or   tracking=none") from error


def _project(tracking: TrackingSettings) -> str:
    return tracking.project or _own_settings().project.name or PROJECT


def _waited_for(call: Callable[[], Any], seconds: float) -> Any:
    """What `call()` gives, within so many seconds. Raises TimeoutError, and whatever it raises.

    It has a thread of its own, where SwanLab cannot take Ctrl-C from the run, and prints nothing.
    """
    given: dict[str, Any] = {}

    def work() -> None:
        try:
            given["value"] = call()
        except BaseException as error:
            given["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    with contextlib.redirect_stdout(io.StringIO()):
        thread.start()
        thread.join(seconds)
    if "error" in given:
        raise RuntimeError(first_line(given["error"])) from given["error"]
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    return given["value"]
