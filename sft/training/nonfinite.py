"""Steps whose loss or gradient is not a finite number: they never reach the weights, are counted, and their rows named.

A loss that is finite but goes up and up is reported once, and so are gradients of exactly 0, and trained weights that get no
gradient at all; the run goes on.
"""

import itertools
import logging
import math
import re
import statistics
from typing import Any

from sft.data.collators import cut
from sft.data.token_cache import row_lengths
from sft.distributed.group import any_of, gathered
from sft.programs import as_called

log = logging.getLogger(__name__)

WINDOW = 10
"""Logged losses whose mean is compared; four such windows in a row have to rise."""

STILL = 3
"""Logged gradients of exactly 0 in a row of which is reported. One alone may be that of rows with nothing to learn."""


class NonFiniteSteps:
    """Watches each step of a trainer between its last backward pass and its optimiser."""

    def __init__(self, trainer: Any, rows: Any, limit: int):
        """`rows` are the tokenised training rows (`input_ids`, `row`), for their names."""
        self.trainer, self.rows, self.limit = trainer, rows, limit
        self.count = 0
        self.loss: Any = 0.0
        self.batches: list[Any] = []
        self.losses: list[float] = []
        """The logged losses of this session, as far back as `rises_steadily` needs."""
        self.rose_at: int | None = None
        """The step at which a steady rise was reported."""
        self.still, self.still_at = 0, None
        """Gradients of 0 in a row by now, and the step at which they were reported."""
        self.unreached: list[tuple[str, Any]] | None = None
        """Trained weights that have had no gradient yet in this session; none once that was reported."""
        self._open: list[tuple[int, Any, list[Any]]] = []

    def state_dict(self) -> dict[str, Any]:
        """The count, for a checkpoint. What is watched of the losses begins anew with each session."""
        return {"bad_steps": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.count = state["bad_steps"]

    def add(self, loss: Any, inputs: dict[str, Any]) -> None:
        """Note the loss and the tokens of one micro-batch; both stay on the device."""
        self.loss = self.loss + loss
        self.batches.append(inputs)

    def guard(self, grad_norm: Any) -> None:
        """Keep a non-finite step from the weights. Call it right before the optimiser's step.

        A fused torch optimiser gets a flag on the device, so that nothing waits for the GPU; the others get no gradients.
        float16's gradient scaler skips steps by itself, as part of finding its scale, and is left alone.
        """
        import torch

        trainer, loss, batches = self.trainer, self.loss, self.batches
        self.loss, self.batches = 0.0, []
        if self.unreached is None:
            self.unreached = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad and p.numel()]
        self.unreached = [(name, weight) for name, weight in self.unreached if weight.grad is None]
        bad = any_of(~torch.isfinite(loss + torch.as_tensor(grad_norm, device=loss.device)))
        if getattr(trainer.accelerator, "scaler", None) is not None:
            return
        self._open.append((trainer.state.global_step + 1, bad.to("cpu", non_blocking=True), batches))
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        if isinstance(optimizer, torch.optim.Optimizer) and all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad.float()
        elif bool(bad):
            trainer.model.zero_grad(set_to_none=True)

    def settle(self, until: float = math.inf) -> str | None:
        """Count the bad ones among the steps since the last call, up to step `until`: why the run has to end, or None.

        To be called when the device has done these steps.
        """
        reason = None
        done = [one for one in self._open if one[0] <= until]
        self._open = self._open[len(done) :]  # they are in order
        for step, bad, batches in done:
            if bool(bad):
                self.count += 1
                names = self._names(batches)
                log.warning("Step %d: the loss or a gradient is not a finite number; it was skipped. Its rows: %s", step, names)
                if self.count > self.limit:
                    reason = (
                        f"{self.count} steps had a loss or gradient that is not a finite number (trainer.max_bad_steps="
                        f"{self.limit}); none reached the weights. The last was step {step}, with {names}"
                    )
        return reason

    def watch(self, step: int, loss: float, grad_norm: float | None = None) -> None:
        """Take note of a logged loss and gradient; say it once if the losses rise steadily, if the weights stand still, or if
        some of them are in no way to the loss."""
        if self.unreached:
            names = [re.sub(r"\.(lora_|modules_to_save\.|weight$|bias$).*", "", name) for name, _ in self.unreached]
            layers = list(dict.fromkeys(names))
            log.warning(
                "Step %d: %d trained weights of %d layers have had no gradient, and stay as they are: %s. "
                "hint: lora.target_modules without them", step, len(names), len(layers),
                ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else ""),
            )  # fmt: skip
            self.unreached = []
        self.still = self.still + 1 if grad_norm == 0 else 0
        if self.still == STILL and self.still_at is None:
            self.still_at = step
            log.warning(
                "Step %d: the gradients of the last %d logged steps were exactly 0, so that the weights stand still. "
                + as_called("hint: scripts/preview.py shows what is trained on; on a GPU try trainer.cuda_graphs=false too"),
                step, STILL,
            )  # fmt: skip
        self.losses = [*self.losses, loss][-4 * WINDOW :]
        if self.rose_at is None and rises_steadily(self.losses):
            self.rose_at = step
            first, last = statistics.fmean(self.losses[:WINDOW]), statistics.fmean(self.losses[-WINDOW:])
            log.warning(
                "Step %d: the training loss rises steadily, from %.3f to %.3f over the last %d logged steps. "
                "hint: a lower trainer.learning_rate; the best checkpoint so far is kept", step, first, last, 4 * WINDOW,
            )  # fmt: skip

    def _names(self, batches: list[Any]) -> str:
        """The rows of a step by their number in the data, found by their tokens."""
        column, lengths = self.rows.data.column("input_ids"), row_lengths(self.rows)[0]
        known = [self.trainer.row_numbers(batch) for batch in batches]
        names = [f"row {number}" for numbers in known for number in dict.fromkeys(numbers or ())]
        unknown = [batch for batch, numbers in zip(batches, known, strict=True) if numbers is None]
        for row in (row["input_ids"] for batch in unknown for row in cut(batch)):
            same = [i for i in (lengths == len(row)).nonzero()[0] if column[i].as_py() == row]
            names += [f"row {self.rows[int(i)]['row']}" for i in same[:1]]
        names = [name for part in gathered(names) for name in part]
        return ", ".join(names) or "rows that could not be found again"


def rises_steadily(losses: list[float]) -> bool:
    """Whether each of the last four windows of WINDOW losses has a higher mean than the one before, beyond their noise.

    The rise from the first to the last has to be four standard errors, which chance gives about once in 30,000 tries.
    """
    if len(losses) < 4 * WINDOW:
        return False
    windows = [losses[at : at + WINDOW] for at in range(len(losses) - 4 * WINDOW, len(losses), WINDOW)]
    means = [statistics.fmean(window) for window in windows]
    error = (2 / WINDOW * statistics.fmean(map(statistics.variance, windows))) ** 0.5
    return all(a < b for a, b in itertools.pairwise(means)) and means[-1] - means[0] > 4 * error
