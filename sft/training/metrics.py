"""What a run measures: the clock of its steps, one log line a step, and metrics.jsonl."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config.method import METHODS
from sft.data.collators import is_padding_free
from sft.distributed import group
from sft.distributed.group import world_size
from sft.storage.jsonio import append_jsonl
from sft.tracking.base import Trackers


def count_tokens(inputs: dict[str, Any]) -> Any:
    """Tokens of a micro-batch without padding, as a number or still on the device.

    With several processes rows of one token are fillers and not counted: a row to learn from has two or more.
    """
    import torch

    mask = inputs.get("attention_mask")  # batches that Unsloth makes padding-free have none, and no padding either
    if world_size() == 1:
        if is_padding_free(inputs):
            return inputs["cu_seq_lens_k"][-2]  # a prompt that a pair shares counts twice
        return inputs["input_ids"].numel() if mask is None else mask.sum()
    if mask is not None:
        lengths = mask.sum(-1)
    elif is_padding_free(inputs):
        lengths = inputs["cu_seq_lens_k"][:-1].diff()
    else:
        starts = inputs["position_ids"].flatten() == 0
        fillers = starts & torch.cat([starts[1:], starts.new_ones(1)])
        return inputs["input_ids"].numel() - fillers.sum()
    return (lengths * (lengths > 1)).sum()


EVALUATED = {method.metric for method in METHODS.values()}
"""What runs are ranked by: a line with one of them is of an evaluation."""

KEPT = {*EVALUATED, "loss", "tokens", "memory_gib", "eval_accuracy", "eval_margin", "reward", "eval_ended"}
"""What run.json keeps the last value of."""


class Recorder:
    """Keeps metrics.jsonl and the final numbers, and passes each line on to the trackers."""

    def __init__(self, folder: Path, tracking: Trackers):
        self.path, self.tracking = folder / "metrics.jsonl", tracking
        self.writes = group.is_first()
        self.final: dict[str, Any] = {}
        self.eval_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The final numbers so far, for a checkpoint."""
        return {"final": self.final, "eval_step": self.eval_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the numbers of a checkpoint."""
        self.final, self.eval_step = state["final"], state["eval_step"]

    def add(self, metrics: dict[str, Any]) -> None:
        """Write one line of metrics."""
        if self.writes:
            append_jsonl(self.path, metrics)
            self.tracking.log(metrics)
        self.final |= {k: v for k, v in metrics.items() if k in KEPT}
        for name in EVALUATED & metrics.keys():
            self.eval_step = metrics["step"]
            self.final.setdefault(f"{name}_start", metrics[name])


class Clock:
    """Seconds spent in training steps, without evaluations, checkpoints and samples."""

    def __init__(self) -> None:
        self.seconds, self._since, self._event = 0.0, None, None
        self.logged = {"tokens": 0, "seconds": 0.0}
        """Both as they were at the last log line."""

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far, for a checkpoint."""
        return {"seconds": self.seconds, "logged": self.logged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.seconds, self.logged = state["seconds"], state["logged"]

    def start(self) -> None:
        """Go on counting; nothing happens if it already counts."""
        if self._since is None:
            self._since, self._event = time.perf_counter(), mark_on_gpu()

    @property
    def now(self) -> float:
        """`seconds` as they would be if counting stopped here."""
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def lap(self, event: Any = None) -> None:
        """Bring `seconds` up to now and go on counting, so that what lies between two steps is part of them.

        With a CUDA event that the GPU has passed, `seconds` come up to when it did: the host's time says nothing there. It may
        be a step ahead, or a thousand kernels, as many as can be queued.
        """
        if self._since is None:
            return
        passed = self.now - self.seconds if event is None else self._event.elapsed_time(event) / 1000
        self.seconds, self._since, self._event = self.seconds + passed, self._since + passed, event

    def stop(self) -> None:
        """Stop counting until the next start. On a GPU it waits for the work that is still queued."""
        if self._since is not None:
            _wait_for_gpu()
            self.seconds, self._since = self.now, None


@dataclass
class LogLine:
    """What a log line says of a step. Its numbers may still be on their way from the GPU."""

    step: int
    epoch: float
    learning_rate: float
    start_time: float
    numbers: dict[str, Any]
    """`loss`, the sum of those since the last line; the gradient's `norm`; `tokens` so far. Numbers, or tensors on the CPU."""
    arrived: Any = None
    """The CUDA event after which they are there; None on the CPU."""

    def logs(self, since: int) -> dict[str, float]:
        """What transformers logs of it, by its names; `since` is the step of the line before. The numbers have to be there."""
        norm = {"grad_norm": float(self.numbers["norm"])} if "norm" in self.numbers else {}
        return {"loss": float(self.numbers["loss"]) / (self.step - since), **norm, "learning_rate": self.learning_rate}


def mark_on_gpu() -> Any:
    """A CUDA event after all that is queued by now, which knows the time it passes; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
