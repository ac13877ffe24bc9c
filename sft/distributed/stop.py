"""A stop that all ranks obey at the same step."""

import signal
from typing import Any

from sft import signals
from sft.distributed.group import broadcast, current


class SharedStop(signals.StopRequest):
    """A stop that all ranks obey at the same step: rank 0 receives it, and broadcasts it where they check together."""

    def __init__(self) -> None:
        super().__init__()
        self.agreed: str | None = None
        """The signal that all ranks know of."""

    @property
    def wanted(self) -> bool:
        """Whether training has to end after this step."""
        return bool(self.agreed or self.out_of_time or self.failure)

    def agree(self) -> None:
        """Take over what rank 0 knows. Every rank has to call it."""
        self.agreed, self.out_of_time = broadcast((self.signal, self.out_of_time))
        self.signal = self.signal or self.agreed

    def check(self) -> None:
        """Raise Interrupted on all ranks if a signal came. Every rank has to call it."""
        self.agree()
        if self.agreed:
            raise signals.Interrupted(self.agreed)

    def _receive(self, number: int, frame: Any) -> None:
        # The parent sends SIGTERM when another rank has died. Then there is nothing to stop cleanly.
        if number == signal.SIGTERM and (group := current()) and group.news.wait(1.0):
            return
        super()._receive(number, frame)


def stop_request() -> signals.StopRequest:
    """What hears of Ctrl-C, SIGTERM and SIGHUP in this run."""
    return SharedStop() if current() else signals.StopRequest()
