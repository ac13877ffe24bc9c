"""Trackio: a database on this machine, which `trackio show` draws in the browser. No account, and nothing is sent."""

import contextlib
import io
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.schema import Settings, TrackingSettings
from sft.programs import as_called
from sft.storage.jsonio import jsonable
from sft.tracking.names import PROJECT, SAMPLES, Tokens, group_of, lines_before, name_metrics, sample_rows

log = logging.getLogger(__name__)

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables by which Trackio would send each line elsewhere, and wait for that at the end."""


def make_tracker() -> "TrackioTracker":
    """The tracker of `tracking=trackio`."""
    return TrackioTracker()


def check(tracking: TrackingSettings) -> str:
    """Where a run will be tracked."""
    remote = " and ".join(name for name in REMOTE if os.environ.get(name))
    later = f"; {remote} is left aside: trackio sync uploads a project" if remote else ""
    return f"Trackio on this machine, project {tracking.project or PROJECT}{later}"


class TrackioTracker:
    """One Trackio run, which is known by its name."""

    name = "trackio"

    def __init__(self) -> None:
        self.run: Any = None
        self.facts: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        """Trackio's config, which it takes with the first line."""
        self.last: dict[str, int] = {}
        """The last step of each metric that the run had before it was cut."""
        self._folder, self._tokens, self._step, self._alert, self._again = Path(), Tokens(Path()), 0, False, False

    def describe(self, facts: dict[str, Any]) -> None:
        """Add facts of the run to Trackio's config."""
        self.known |= jsonable(facts)
        if self.run is not None:
            self.run.config.update(jsonable(facts))

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict[str, Any]) -> None:
        """Begin a run, or go on with the one of this name that was cut."""
        tracking = settings.tracking
        self._folder, self._tokens, self._alert, self._again = folder, Tokens(folder), tracking.alert, bool(before)
        project, group = before.get("project") or tracking.project or PROJECT, group_of(tracking)
        shown = before.get("id") or tracking.name or f"{name}_{secrets.token_hex(4)}"
        noted = {"tags": [*dict.fromkeys([*tags, *tracking.tags])], "notes": tracking.notes}
        with _quiet():
            import trackio

            for variable in REMOTE:
                os.environ.pop(variable, None)
            config = {**jsonable(settings), **self.known, **noted}
            resume = "allow" if before else "never"
            self.run = trackio.init(project, shown, group=group, config=config, resume=resume, embed=False)
            for line in trackio.SQLiteStorage.get_logs(project, shown, run_id=self.run.id) if before else ():
                self.last |= {key: max(line["step"], self.last.get(key, 0)) for key in line}
        self.facts = {"mode": "offline", "url": None, "sync": None, "id": shown, "project": project, "group": group}
        log.info("Trackio Look at it: %s", as_called(f"trackio show --project {project}"))

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        if self._again:
            self._again, self._tokens.so_far = False, 0
            for line in lines_before(self._folder):
                self.log(line)
        self._step, named = metrics["step"], name_metrics(metrics, self._tokens.at(metrics))
        new = {key: value for key, value in named.items() if self._step > self.last.get(key, -1)}
        if new:
            self.run.log(new, step=self._step)

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Add a table of the samples of this step, with the first completion of each prompt."""
        import trackio

        self.run.log({"samples": trackio.Table([*SAMPLES], sample_rows(lines, earlier))}, step=lines[0]["step"])

    def log_rollouts(self, step: int, columns: list[str], rows: list[list[Any]], earlier: list[list[Any]]) -> None:
        """Add a table of the rollouts of this step."""
        import trackio

        self.run.log({"rollouts": trackio.Table(columns, rows)}, step=step)

    def finish(self, status: str, metrics: dict[str, Any], reason: str | None) -> None:
        """Write the final metrics, status and reason, and wait until all is in the database."""
        import trackio

        final = {f"final/{key}": value for key, value in jsonable(metrics).items() if isinstance(value, int | float)}
        with _quiet():
            ending = trackio.Markdown(f"{status}: {reason}" if reason else status)
            self.run.log({**final, "ending": ending}, step=self._step)
            if self._alert:
                level = {"failed": trackio.AlertLevel.ERROR, "stopped": trackio.AlertLevel.WARN}
                self.run.alert(f"{self.run.name}: {status}", reason, level.get(status, trackio.AlertLevel.INFO))
            trackio.finish()

    def state(self) -> dict[str, Any]:
        """Its project and name."""
        return dict(self.facts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the console of what Trackio prints there."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
