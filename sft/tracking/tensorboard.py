"""TensorBoard: event files in `<run folder>/tensorboard`, where `tensorboard --logdir outputs` finds them."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from sft.config.keys import flatten
from sft.config.method import METHODS
from sft.config.schema import Settings, TrackingSettings
from sft.programs import as_called
from sft.storage.jsonio import jsonable
from sft.tracking.names import SAMPLES, Tokens, lines_before, name_metric, name_metrics, sample_rows

log = logging.getLogger(__name__)


def make_tracker() -> "TensorBoardTracker":
    """The tracker of `tracking=tensorboard`."""
    return TensorBoardTracker()


def check(tracking: TrackingSettings) -> str:
    """Where a run will be tracked."""
    return "TensorBoard, files in the run folder"


class TensorBoardTracker:
    """One folder of event files. The run is called by its folder, and a sweep is the folder around it."""

    name = "tensorboard"

    def __init__(self) -> None:
        self.writer: Any = None
        self.config: dict[str, Any] = {}
        self.ending: Any = None
        """The record that ends the run in the table of hyperparameters."""
        self._folder, self._again, self._tokens = Path(), False, Tokens(Path())

    def describe(self, facts: dict[str, Any]) -> None:
        """Note facts of the run beside its settings."""
        self.config |= jsonable(facts)
        if self.writer is not None:
            self._write("config", json.dumps(self.config, indent=1, ensure_ascii=False))

    def start(self, settings: Settings, folder: Path, name: str, tags: list[str], before: dict[str, Any]) -> None:
        """Open a file of events; a run that was cut goes on in a further one."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._folder, self._again, self._tokens = folder, bool(before), Tokens(folder)
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        values = {key: _plain(value) for key, value in flatten(jsonable(settings)).items() if value is not None}
        *opening, self.ending = hparams(values, {name_metric(METHODS[settings.method.name.value].metric): 0.0})
        for record in opening:
            self.writer.file_writer.add_summary(record)
        tracking = settings.tracking
        self.config = {**jsonable(settings), "tags": [*tags, *tracking.tags], "notes": tracking.notes} | self.config
        self.describe({})
        log.info("TensorBoard Look at it: %s", as_called(f"tensorboard --logdir {os.path.relpath(folder / 'tensorboard')}"))

    def log(self, metrics: dict[str, Any]) -> None:
        """Add one line of metrics; `step` is among them."""
        if self._again:
            self._hide_lost_lines()
        for key, value in name_metrics(metrics, self._tokens.at(metrics)).items():
            self.writer.add_scalar(key, value, metrics["step"])
        self.writer.flush()  # a run that is killed loses nothing

    def log_samples(self, lines: list[dict], earlier: list[dict]) -> None:
        """Add a text for each completion, with the first one of its prompt; the texts of a prompt lie under one name."""
        for line, row in zip(lines, sample_rows(lines, earlier), strict=True):
            cells = [f"**{title}**\n\n{_quoted(cell)}" for title, cell in zip(SAMPLES, row, strict=True)]
            self.writer.add_text(f"samples/{line['index']}", "\n\n".join(cells), line["step"])

    def log_rollouts(self, step: int, columns: list[str], rows: list[list[Any]], earlier: list[list[Any]]) -> None:
        """Add a text for each row, the best completion of the step as `rollouts/0`."""
        for number, row in enumerate(rows):
            cells = [f"**{title}**\n\n{_quoted(cell)}" for title, cell in zip(columns, row, strict=True)]
            self.writer.add_text(f"rollouts/{number}", "\n\n".join(cells), step)

    def finish(self, status: str, metrics: dict[str, Any], reason: str | None) -> None:
        """Write the final metrics, status and reason as a text, and close the file."""
        ending = {**jsonable(metrics), "status": status, "reason": reason}
        self._write("ending", json.dumps(ending, indent=1, ensure_ascii=False))
        if status != "failed":  # TensorBoard would call it a success
            self.writer.file_writer.add_summary(self.ending)
        self.writer.close()

    def state(self) -> dict[str, Any]:
        """That it is here alone."""
        return {"mode": "offline", "url": None, "sync": None}

    def _write(self, title: str, text: str) -> None:
        self.writer.add_text(title, _quoted(text))

    def _hide_lost_lines(self) -> None:
        """Have TensorBoard leave out what came after the checkpoint, where metrics.jsonl ends but for this line."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        steps = [line.get("step", 0) for line in lines_before(self._folder)]
        restart = Event(session_log=SessionLog(status=SessionLog.START))
        self.writer.file_writer.add_event(restart, step=max(steps, default=-1) + 1)
        self._again = False


def _plain(value: Any) -> Any:
    """A setting as TensorBoard's table of hyperparameters takes it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value, ensure_ascii=False)


def _quoted(value: Any) -> str:
    """A text as it stands, for a page that reads Markdown."""
    return "\n".join(f"    {line}" for line in str(value).splitlines())
