"""Trackers: where curves and samples of a run go beside its folder. None of them ever ends a run, or another tracker.

A tracker is a file `sft/tracking/<name>.py`, an entry of `TrackerName` in config/schema.py and of `TAKES` in
config/tracking_rules.py, conf/tracking/<name>.yaml, and an extra of that name in setup.cfg if it needs a package. The file has
`make_tracker()` and `check(tracking)`, which says for the preflight where a run will be tracked.
"""

import importlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sft.config.schema import Settings
from sft.config.tracking_rules import trackers_of
from sft.errors import first_line
from sft.tracking.names import RolloutTable

log = logging.getLogger(__name__)

NOTHING = {"mode": "none", "url": None, "sync": None}
"""What run.json says of a run that is tracked nowhere."""

UNNAMED = "wandb"
"""The tracker whose facts in run.json do not say whose they are: once there was no other."""


class Tracker(Protocol):
    """One service that a run is tracked with. Every call may raise: `Trackers` then leaves this one out."""

    name: str
    """As in `tracking=<name>`."""

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict[str, Any]) -> None:
        """Begin to track the run `name`; `before` is what `state` gave when the same run was cut, else empty."""

    def describe(self, facts: dict[str, Any]) -> None:
        """Note what is known of the run beside its settings: before `start`, and whenever there is more."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Add lines of samples.jsonl, all of one step; `earlier` are the run's lines of before, also before a resume."""

    def log_rollouts(self, step: int, columns: list[str], rows: list[list[Any]], earlier: list[list[Any]]) -> None:
        """Add rows to the table of rollouts at a step; `earlier` are the run's rows of before, also before a resume."""

    def finish(self, status: str, metrics: dict[str, Any], reason: str | None) -> None:
        """End with the run's status, its final metrics, and why it did not just finish."""

    def state(self) -> dict[str, Any]:
        """What run.json keeps of it, at any time: `mode`, `url`, `sync` (how to upload it), and what `start` goes on with."""


class Trackers:
    """The trackers of a run, as one: a call goes to each, and one that fails is left out from then on, with a warning."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self.trackers = [*trackers]
        self._failed: set[str] = set()
        self._rollouts = RolloutTable()
        self._before: Path | None = None
        """The folder of a run that goes on, until its earlier rollouts are in the table."""

    def begin(self, settings: Settings, folder: Path, record: dict[str, Any], backend: str) -> dict[str, Any]:
        """Begin to track the run with this run.json, or go on with it; returns what run.json keeps of that."""
        self.describe(facts_to_track(record, folder, backend))
        self.start(settings, folder, record.get("name") or "run", tags_to_track(record, backend), record.get("tracking"))
        return self.state()

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict[str, Any] | None = None) -> None:
        """Begin to track; `before` is what run.json kept of the same run that was cut."""
        self._before = folder if before else None
        self._each("start", lambda tracker: tracker.start(settings, folder, name, tags, _facts_of(before or {}, tracker.name)))

    def describe(self, facts: dict[str, Any]) -> None:
        """Note facts of the run beside its settings: before `start`, and whenever there are more."""
        self._each("take the run's facts", lambda tracker: tracker.describe(dict(facts)))

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        self._each("log metrics", lambda tracker: tracker.log(dict(metrics)))
        if "reward" in metrics and self.trackers:
            self._pass_rollouts(metrics["step"])

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Add the lines of samples.jsonl of one step; `earlier` are those of before."""
        if lines:
            self._each("log samples", lambda tracker: tracker.log_samples([*lines], [*earlier]))

    def log_rollouts(self, lines: list[dict]) -> None:
        """Have some of these lines of rollouts.jsonl, all of one step, go with the next log line."""
        if self.trackers:
            self._rollouts.keep(lines)

    def _pass_rollouts(self, step: int) -> None:
        """Add what was kept to the table of rollouts; a run that goes on has its earlier rows from its files."""
        if self._before:
            kept, self._rollouts = self._rollouts.kept, RolloutTable()
            self._rollouts.replay(self._before, step)
            self._rollouts.kept |= kept
            self._before = None
        table, earlier = self._rollouts, [*self._rollouts.rows]
        if rows := table.take(step):
            self._each("log rollouts", lambda t: t.log_rollouts(step, table.columns, [*rows], [*earlier]))

    def finish(self, status: str, metrics: dict[str, Any], reason: str | None = None) -> None:
        """End with the run's status, its final metrics, and why it did not just finish."""
        self._each("finish", lambda tracker: tracker.finish(status, dict(metrics), reason))

    def state(self) -> dict[str, Any]:
        """What run.json keeps as `tracking`: the first tracker's facts, and those of any others under their names."""
        facts = dict(NOTHING)
        for tracker in self.trackers:
            own = self._try(tracker, "say where it is", tracker.state) or {}
            if tracker is not self.trackers[0]:
                facts[tracker.name] = own
            else:
                facts |= own if tracker.name == UNNAMED else {**own, "tracker": tracker.name}
        return facts

    def _each(self, action: str, call: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            if tracker.name not in self._failed:
                self._try(tracker, action, lambda tracker=tracker: call(tracker))

    def _try(self, tracker: Tracker, action: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever goes wrong in a tracker, the run goes on
            if tracker.name not in self._failed:
                self._failed.add(tracker.name)
                why = first_line(error)
                log.warning(
                    "tracking=%s could not %s (%s); the run goes on and its folder has everything.", tracker.name, action, why
                )
            return None


def _facts_of(before: dict[str, Any], name: str) -> dict[str, Any]:
    """A tracker's own facts among those of run.json."""
    own = before if before.get("tracker", UNNAMED) == name else before.get(name)
    return dict(own) if isinstance(own, dict) else {}


def facts_to_track(record: dict[str, Any], folder: Path, backend: str) -> dict[str, Any]:
    """What a tracker is told of a run beside its settings, from its run.json."""
    run = {"folder": str(folder.absolute()), "command": record.get("command")}
    keys = ("git_commit", "config_hash", "data", "versions", "hardware", "choices")
    return {"run": run, **{key: record[key] for key in keys if record.get(key)}, "backend": backend}


def tags_to_track(record: dict[str, Any], backend: str) -> list[str]:
    """A run's tags, from its run.json: what was chosen of each group, the backend and the GPU."""
    gpu = (record.get("hardware") or {}).get("gpu")
    return [*(record.get("tags") or []), backend, *([gpu] if gpu else [])]


def make_trackers(settings: Settings) -> Trackers:
    """What a run with these settings is tracked with; empty with `tracking=none`."""
    return Trackers(_module_of(name).make_tracker() for name in trackers_of(settings.tracking))


def check_tracking(settings: Settings) -> str:
    """Where a run with these settings will be tracked, in words. Raises Refusal where it cannot be as set."""
    names = trackers_of(settings.tracking)
    return "; ".join(_module_of(name).check(settings.tracking) for name in names) or "the run folder alone"


def _module_of(name: str) -> ModuleType:
    """The file of a tracker."""
    return importlib.import_module(f"sft.tracking.{name}")
