"""Ctrl-C, SIGTERM and SIGHUP: received at once, obeyed at the end of a step."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """An evaluation or a completion is given up because the run has to stop."""


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
        """The same, for this process alone where there are several."""
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
