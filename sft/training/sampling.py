"""A run's completions of fixed prompts: generated, written to samples.jsonl, and their share of end marks noted.

samples.jsonl is their whole state: a checkpoint knows its length, and what was generated before stands in it.
"""

import logging
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft.distributed import group, strategy
from sft.generation import samples
from sft.model import warm_cache
from sft.storage import jsonio
from sft.training.context import RunContext
from sft.training.oom import free_memory

log = logging.getLogger(__name__)


class SampleWriter:
    """Writes the completions of a run."""

    def __init__(
        self,
        folder: Path,
        recorder: Any,
        timed: Callable[[str], Any],
        lines_at: Callable[[int], list[dict]] | None,
        by_all: bool = False,
    ):
        """`lines_at(step)` gives the lines of samples.jsonl; None if there are no prompts. `by_all`: a completion needs what
        each process has of the weights.
        """
        self.folder, self.recorder, self.timed, self.lines_at, self.by_all = folder, recorder, timed, lines_at, by_all
        self._take_as_agreed = self._take if by_all else group.alone(self._take)

    def take(self, step: int) -> None:
        """Have the prompts completed by the weights of this step, and keep that. Raises Interrupted if the run is to stop."""
        if self.lines_at is not None:
            self._take_as_agreed(step)

    def _take(self, step: int) -> None:
        recorder, lines = self.recorder, self._if_it_fits(step)
        if lines is None or not recorder.writes:
            return
        path = self.folder / "samples.jsonl"
        earlier = [line for line in jsonio.read_lines(path) if {"index", "completion"} <= line.keys()]
        for line in lines:
            jsonio.append_jsonl(path, line)
        share = samples.eos_share(lines)
        recorder.final.setdefault("eos_share_start", share)
        recorder.final["eos_share"] = share
        recorder.add({"step": step, "eos_share": share})
        recorder.tracking.log_samples(lines, earlier)

    def _if_it_fits(self, step: int) -> list[dict] | None:
        """The lines; None, with a warning, where the memory is too small: nothing that is trained depends on them."""
        import torch

        try:
            with self.timed("samples"):
                return self.lines_at(step)
        except torch.OutOfMemoryError as error:
            if self.by_all:
                raise  # the other processes wait for this one
            traceback.clear_frames(error.__traceback__)
            free_memory()
            log.warning("Step %d: too little memory for completions now; the run goes on.", step)
            return None


def generator(ctx: RunContext, model: Any) -> Callable[[int], list[dict]] | None:
    """`generate(step)`: the lines of samples.jsonl that the weights of this step give; None without prompts."""
    prompts = samples.choose_prompts(ctx.prepared, ctx.settings, ctx.tokenizer)
    check = ctx.stop.check if strategy.shards(ctx.settings) else ctx.stop.check_here
    key = [[asdict(prompt) for prompt in prompts], sorted(ctx.stop_ids), ctx.settings.samples.max_new_tokens]

    def generate(step: int) -> list[dict]:
        def complete() -> list[dict]:
            return samples.generate(model, ctx.tokenizer, prompts, ctx.settings, ctx.stop_ids, step, check)

        return complete() if step else warm_cache.of_base("completions", model, ctx.settings, key, complete)

    return generate if prompts else None
