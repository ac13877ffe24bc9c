"""MLflow: `mlflow.db` in the working folder, or the server or database that MLFLOW_TRACKING_URI names."""

import contextlib
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from sft.config.keys import flatten
from sft.config.schema import Settings, TrackingMode, TrackingSettings
from sft.errors import first_line, refuse
from sft.programs import as_called
from sft.sanitize import without_passwords
from sft.storage.jsonio import jsonable
from sft.tracking.names import PROJECT, SAMPLES, Tokens, group_of, lines_before, name_metrics, sample_rows
from sft.tracking.server import takes_connection

log = logging.getLogger(__name__)

WAIT_SECONDS = 5
"""How long lines wait to be written together."""

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def make_tracker() -> "MlflowTracker":
    """The tracker of `tracking=mlflow`."""
    return MlflowTracker()


def check(tracking: TrackingSettings) -> str:
    """Where a run will be tracked. Raises Refusal where that is no server, and one was asked for."""
    store, why = choose_store(tracking.mode)
    if why and tracking.mode == TrackingMode.online:
        raise refuse("tracking.mode=online", f"MLflow has no server: {why}.", "tracking.mode=auto")
    local = f" ({why})" if why else ""
    return f"MLflow, {without_passwords(store)}{local}, experiment {_experiment(tracking)}"


def choose_store(mode: TrackingMode) -> tuple[str, str]:
    """(MLflow's tracking URI, why it is not a server's); a server that takes no connection is not waited for."""
    local = _local_store()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or local
    remote = not uri.startswith(("sqlite:", "file:", "/", "."))
    if not remote:
        return uri, "MLFLOW_TRACKING_URI names no server"
    if mode == TrackingMode.offline:
        return local, "as set"
    if uri.startswith(("http:", "https:")) and not takes_connection(uri):
        return local, f"{without_passwords(uri)} takes no connection"
    return uri, ""


class MlflowTracker:
    """One MLflow run, by MLflow's client: nothing is global, and nothing outlives the run."""

    name = "mlflow"

    def __init__(self) -> None:
        self.client: Any = None
        self.facts: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        """What was told of the run."""
        self.written: dict[str, str] = {}
        """MLflow's parameters; they never change."""
        self.lines: list[Any] = []
        """Metrics that wait to be written."""
        self.last: dict[str, int] = {}
        """The last step of each metric that the run had before it was cut."""
        self.tables: list[str] = []
        """Artifacts that its page shows as tables."""
        self._folder, self._tokens, self._again, self._since = Path(), Tokens(Path()), False, time.monotonic()

    def describe(self, facts: dict[str, Any]) -> None:
        """Add facts of the run to its parameters."""
        self.known |= jsonable(facts)
        if self.client is not None:
            self._write_parameters()

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict[str, Any]) -> None:
        """Begin a run, or go on with the one that was cut where the store has it. A store that takes none: the local one."""
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # with MLflow's own a run waits for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        self._folder, self._tokens, self._again = folder, Tokens(folder), bool(before)
        self.known = {**jsonable(settings), **self.known}
        store, why = choose_store(settings.tracking.mode)
        try:
            self._begin(store, bool(why), settings.tracking, name, tags, before)
        except Exception as error:
            if store == _local_store():
                raise
            log.warning("MLflow could not start at %s (%s): it goes on here.", without_passwords(store), first_line(error))
            self._begin(_local_store(), True, settings.tracking, name, tags, before)

    def _begin(self, store: str, local: bool, tracking: TrackingSettings, name: str, tags: list[str], before: dict) -> None:
        from mlflow import MlflowClient

        experiment, group = _experiment(tracking), group_of(tracking)
        with _alone(store):
            self.client = MlflowClient(tracking_uri=store)
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment)
        noted = {"notes": tracking.notes or (self.known.get("run") or {}).get("command"), "group": group}
        noted["tags"] = ", ".join(dict.fromkeys([*tags, *tracking.tags]))
        run = self._run_of_before(before, number)
        if run is None:
            run = self.client.create_run(number, run_name=tracking.name or name)
        self.run_id, self.written = run.info.run_id, dict(run.data.params)
        for key, value in noted.items():
            if value:
                self.client.set_tag(self.run_id, "mlflow.note.content" if key == "notes" else key, value)
        self._write_parameters()
        view = "workflowType=machine_learning"  # else MLflow shows it among traces
        page = f"{without_passwords(store)}/#/experiments/{number}/runs/{self.run_id}?{view}"
        url = page if store.startswith("http") else None
        self.facts = {
            "mode": "offline" if local else "online",
            "url": url,
            "sync": None,
            "id": self.run_id,
            "project": experiment,
            "group": group,
        }
        log.info("MLflow %s", url or as_called(f"Look at it: mlflow ui --backend-store-uri {without_passwords(store)}"))

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        from mlflow.entities import Metric

        if self._again:
            self._again, self._tokens.so_far = False, 0
            for line in lines_before(self._folder):
                self.log(line)
        step, now = metrics["step"], int(time.time() * 1000)
        named = name_metrics(metrics, self._tokens.at(metrics))
        self.lines += [Metric(key, value, now, step) for key, value in named.items() if step > self.last.get(key, -1)]
        if time.monotonic() - self._since > WAIT_SECONDS or len(self.lines) > 500:
            self._write_lines()

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Write the table of samples anew, with all there are by now."""
        self._write_lines()
        table = {"columns": [*SAMPLES], "data": sample_rows([*earlier, *lines], [])}
        self._log_table("samples.json", table)

    def log_rollouts(self, step: int, columns: list[str], rows: list[list[Any]], earlier: list[list[Any]]) -> None:
        """Write the table of rollouts anew, with all there are by now."""
        self._log_table("rollouts.json", {"columns": columns, "data": [*earlier, *rows]})

    def _log_table(self, name: str, table: dict[str, Any]) -> None:
        self.client.log_dict(self.run_id, table, name)
        self.tables = [*dict.fromkeys([*self.tables, name])]
        listed = json.dumps([{"path": one, "type": "table"} for one in self.tables])
        self.client.set_tag(self.run_id, "mlflow.loggedArtifacts", listed)

    def finish(self, status: str, metrics: dict[str, Any], reason: str | None) -> None:
        """Write the final metrics, the reason, and the run's own status."""
        from mlflow.entities import Metric

        final = {key: value for key, value in jsonable(metrics).items() if isinstance(value, int | float)}
        self.lines += [Metric(f"final/{key}", value, int(time.time() * 1000), 0) for key, value in final.items()]
        self._write_lines()
        self.client.set_tag(self.run_id, "reason", reason or status)
        self.client.set_terminated(self.run_id, STATUS[status])

    def state(self) -> dict[str, Any]:
        """Its place and id."""
        return dict(self.facts)

    def _run_of_before(self, before: dict[str, Any], experiment: str) -> Any:
        """The run that was cut, at work again; None where this store does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(before["id"])
        except (KeyError, MlflowException):
            return None
        if run.info.experiment_id != experiment or run.info.lifecycle_stage != "active":
            return None
        self.client.update_run(run.info.run_id, status="RUNNING")
        for key in run.data.metrics:
            self.last[key] = max(metric.step for metric in self.client.get_metric_history(run.info.run_id, key))
        return run

    def _write_parameters(self) -> None:
        from mlflow.entities import Param

        texts = {re.sub(r"[^\w/. :-]", "_", key)[:250]: _text(value) for key, value in flatten(self.known).items()}
        new = {key: value for key, value in texts.items() if key not in self.written}
        for start in range(0, len(new), 100):  # as many as it takes at once
            self.client.log_batch(self.run_id, params=[Param(*pair) for pair in [*new.items()][start : start + 100]])
        self.written |= new

    def _write_lines(self) -> None:
        lines, self.lines, self._since = self.lines, [], time.monotonic()
        for start in range(0, len(lines), 1000):
            self.client.log_batch(self.run_id, metrics=lines[start : start + 1000])


def _local_store() -> str:
    return f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def _alone(store: str) -> Any:
    """No other job of a sweep in the block: MLflow breaks a database that two processes make at once."""
    from filelock import FileLock

    return FileLock(f"{store.removeprefix('sqlite:///')}.lock") if store.startswith("sqlite:///") else contextlib.nullcontext()


def _experiment(tracking: TrackingSettings) -> str:
    return tracking.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:6000]
