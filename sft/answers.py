"""What a run does with its answers to fixed prompts: ask for them, go on, and keep them when they are there."""

import functools
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft import distributed, runtime, samples
from sft.smaller_passes import give_back

log = logging.getLogger(__name__)

Wait = Callable[[], list[dict]]
"""Waits for the answers of a step; gives their lines of samples.jsonl."""


class Answers:
    """The answers of a run."""

    def __init__(
        self,
        folder: Path,
        recorder: Any,
        timed: Callable[[str], Any],
        generate: Callable[[int, bool], Wait] | None,
        by_all: bool = False,
    ):
        """`generate(step, later)` asks for those of a step, as `samples.generate` does; None if there are no prompts. `by_all`:
        an answer needs what each process has of the weights.
        """
        self.folder, self.recorder, self.timed, self.generate, self.by_all = folder, recorder, timed, generate, by_all
        self.pending: Callable[[], None] | None = None
        """Waits for the answers that were asked for last, and keeps them."""
        self._ask_as_agreed = self._ask if by_all else distributed.alone(self._ask)

    def ask(self, step: int, later: bool = False) -> None:
        """Ask for the answers of a step, which `keep` keeps; with `later` they may be given in between.

        Raises Interrupted where the run is to stop.
        """
        if self.generate is not None:
            self._ask_as_agreed(step, later and distributed.world_size() == 1)  # untried beside other processes' messages

    def keep(self) -> bool:
        """Wait for the answers that were asked for, and keep them; whether there were any. Raises Interrupted too."""
        keep, self.pending = self.pending, None
        if keep is not None:
            keep()
        return keep is not None

    def _ask(self, step: int, later: bool) -> None:
        def ask() -> Wait:
            wait = self.generate(step, later)
            if not later:
                wait()
            return wait

        wait = self._if_it_fits(step, ask)
        self.pending = functools.partial(self._keep, wait, step) if wait else None

    def _keep(self, wait: Wait, step: int) -> None:
        recorder, lines = self.recorder, self._if_it_fits(step, wait)
        if lines is None or not recorder.writes:
            return
        for line in lines:
            runtime.append_jsonl(self.folder / "samples.jsonl", line)
        share = samples.eos_share(lines)
        recorder.final.setdefault("eos_share_start", share)
        recorder.final["eos_share"] = share
        recorder.add({"step": step, "eos_share": share})
        recorder.tracking.samples(lines)

    def _if_it_fits(self, step: int, action: Callable[[], Any]) -> Any:
        """What `action()` gives; None, with a warning, where the memory is too small: nothing that is trained depends on it."""
        import torch

        try:
            with self.timed("samples"):
                return action()
        except torch.OutOfMemoryError as error:
            if self.by_all:
                raise  # the other processes wait for this one
            traceback.clear_frames(error.__traceback__)
            give_back()
            log.warning("Step %d: too little memory for answers now; the run goes on.", step)
            return None
