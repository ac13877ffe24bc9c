"""How long a run may take: `trainer.max_hours` and `trainer.stop_at`, less the measured time that its ending needs."""

import contextlib
import logging
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from sft.config.rules import moment_of
from sft.config.schema import TrainerSettings

log = logging.getLogger(__name__)

FINISH = 15.0
"""Seconds kept for what cannot be measured beforehand: the best weights loaded back, the report, the tracker's goodbye."""

IMPORTS = 20.0
"""Seconds in which the process that exports starts."""

MARGIN = 1.2
"""What was measured may take this much longer at the end."""


class TimeBudget:
    """The time a run has, from when this is made; a clock that is set meanwhile changes nothing."""

    def __init__(self, settings: TrainerSettings, exports: int = 0) -> None:
        """`exports` is the number of artifacts that are made and proven after the training."""
        self.exports = exports
        left = [settings.max_hours * 3600] if settings.max_hours else []
        if settings.stop_at:
            now = datetime.now().astimezone()
            seconds = (moment_of(settings.stop_at, now) - now).total_seconds()
            if seconds > 0:
                left.append(seconds)
            else:
                log.warning("trainer.stop_at=%s is past, so it is ignored.", settings.stop_at)
        self.deadline = time.monotonic() + min(left) if left else None
        self.needs: dict[str, float] = {}
        """Longest seconds seen of a `step`, of `load`, `evaluate`, `samples`, `save`."""
        self.earlier: dict[str, float] = {}
        """The same of the session before, which count until this one has measured its own."""

    def state_dict(self) -> dict[str, Any]:
        """What was measured, for a checkpoint."""
        return {"needs": self.earlier | self.needs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count with what the session before has measured."""
        self.earlier = state.get("needs", {})

    @contextlib.contextmanager
    def measured(self, part: str) -> Iterator[None]:
        """Note how long a part takes. One that is given up is not measured."""
        begin = time.monotonic()
        yield
        self.note(part, time.monotonic() - begin)

    def note(self, part: str, seconds: float) -> None:
        """Keep the longest time of a part."""
        self.needs[part] = max(self.needs.get(part, 0.0), seconds)

    @property
    def reserve(self) -> float:
        """Seconds to keep for one step more, the last evaluation and completions, the checkpoint and the adapter, the exports,
        and the loss that they are compared with: of a few held-out rows (sft/export/measure.py), it takes no longer than the
        former.

        An export measures the trained model once, and each artifact once more: it is written (as long as loading took), loaded,
        and its loss and completions are taken.
        """
        needs = self.earlier | self.needs
        proof = sum(needs.get(part, 0.0) for part in ("load", "load", "evaluate", "samples"))
        exports = (self.exports + 1) * proof + IMPORTS if self.exports else 0.0
        parts = [needs.get(part, 0.0) for part in ("step", "evaluate", "evaluate", "samples", "save", "save")]
        return MARGIN * (sum(parts) + exports) + FINISH

    @property
    def wants_measuring(self) -> bool:
        """Whether a checkpoint should be saved to see how long that takes: there is a limit, and none was saved yet."""
        return self.deadline is not None and "save" not in self.needs

    def used_up(self) -> bool:
        """Whether the run has to end now to be done in time."""
        return self.deadline is not None and time.monotonic() + self.reserve >= self.deadline
