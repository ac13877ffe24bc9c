"""OOM retry: a micro-batch that runs out of memory is repeated with fewer rows at a time; the step stays the same.

The loss of a step is a sum over its target tokens divided by their number, so that it can be had from any pieces. The step is
repeated from its first micro-batch: a backward pass that broke off has left a part of its gradients behind. Not where several
processes share the step: the others are in the middle of adding up their gradients with it.
"""

import gc
import logging
import traceback
from collections.abc import Callable
from typing import Any

from sft.data.tokenize import IGNORED
from sft.distributed.group import world_size
from sft.model.cuda_graphs import forget_graphs

log = logging.getLogger(__name__)


class OomRetry:
    """Watches the micro-batches of a trainer's steps."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.rows: int | None = None
        """Rows that go through the model at a time from now on; None as long as whole micro-batches fit."""
        self.evaluated_rows: int | None = None
        """The same for held-out rows."""
        self._step, self._passes = -1, []

    def state_dict(self) -> dict[str, Any]:
        """The rows that fit, for a checkpoint."""
        return {"rows_at_once": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin with the rows that fitted before."""
        self.rows = state.get("rows_at_once")

    def train(self, train: Callable[..., Any], model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
        """The loss of one micro-batch, its gradients added up as `train(model, inputs, items)` does it.

        `items` is the number of target tokens in the whole step. Raises torch.OutOfMemoryError where a single row does not fit,
        or where the loss is a mean that cannot be had from pieces (`items` is None).
        """
        if self._step != self.trainer.state.global_step:
            self._step, self._passes = self.trainer.state.global_step, []
        self._passes.append(inputs)
        loss = self._attempt(train, model, self._passes[-1:], items)
        while loss is None:
            self._make_room(model)
            loss = self._attempt(train, model, self._passes, items)
        return loss

    def evaluate(self, predict: Callable[[dict], Any], inputs: dict[str, Any]) -> list[tuple[Any, Any]]:
        """(mean loss, target tokens) of a batch of held-out rows, or of each of the pieces in which it fits into the memory.

        Raises torch.OutOfMemoryError where a single row does not fit.
        """
        import torch

        while True:
            results, rows = [], []
            try:
                for piece in self._pieces(inputs, self.evaluated_rows):
                    rows = piece
                    batch = self._collated(piece, inputs)
                    targets = (batch["labels"][:, 1:] != IGNORED).sum()  # the first token of a row is predicted by nothing
                    results.append((predict(batch), targets))
                return results
            except torch.OutOfMemoryError as error:
                count = len(rows) if isinstance(rows, list) else len(self.trainer.cut(rows))
                if count <= 1 or world_size() > 1:
                    raise
                traceback.clear_frames(error.__traceback__)
                self.evaluated_rows = count // 2
            del results
            free_memory()
            log.warning("Evaluation: %d rows at a time do not fit into the memory; from now on %d.", count, self.evaluated_rows)

    def _attempt(self, train: Callable[..., Any], model: Any, micro_batches: list[dict], items: Any) -> Any:
        """The loss of the last of `micro_batches`, each made in pieces; None if one ran out of memory."""
        import torch

        rows = []
        try:
            for inputs in micro_batches:
                loss = None
                for piece in self._pieces(inputs, self.rows):
                    rows = piece
                    found = train(model, self._collated(piece, inputs), items)
                    loss = found if loss is None else loss + found
            return loss
        except torch.OutOfMemoryError as error:
            count = len(rows) if isinstance(rows, list) else len(self.trainer.cut(rows))
            if items is None or world_size() > 1:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what has to be freed
            if forget_graphs(model):
                log.warning(
                    "Step %d: the memory ran out beside what captured steps (CUDA graphs) keep of it. The step is repeated "
                    "without them, and so are the next ones.", self._step + 1,
                )  # fmt: skip
                return None
            if count <= 1:
                raise
            self.rows = count // 2
        log.warning(
            "Step %d: %d rows at a time do not fit into the memory; it is repeated with %d, and so are the next ones.",
            self._step + 1, count, self.rows,
        )  # fmt: skip
        return None

    def _pieces(self, inputs: dict[str, Any], most: int | None) -> list[Any]:
        """A micro-batch as it is, or lists of at most `most` of its rows."""
        if most is None:
            return [inputs]
        rows = self.trainer.cut(inputs)
        if len(rows) <= most:
            return [inputs]
        return [rows[at : at + most] for at in range(0, len(rows), most)]

    def _collated(self, piece: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model takes: the trainer's own way of putting rows together, padded or padding-free."""
        return self.trainer.data_collator(piece) if isinstance(piece, list) else inputs

    def _make_room(self, model: Any) -> None:
        model.zero_grad(set_to_none=True)
        self.trainer.repeat_step()
        free_memory()


def free_memory() -> None:
    """Let go of what a micro-batch that broke off has left behind."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
