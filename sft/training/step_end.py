"""What the end of a step and its log line leave for later, and what a checkpoint keeps of that."""

from dataclasses import dataclass, field
from typing import Any

from sft.distributed import group


@dataclass
class StepEnd:
    """How far the end of the current step is.

        running ◀────────────────────────────────────────────────────────────┐
           │ a step is done                                                   │
           ▼                                                                  │
        noted: what transformers and the budget ask for becomes `due` or      │
           │   `save_due`; the log line is taken; all ranks agree on a stop   │
           │                                                                  │
           ├── not `pending`, no stop wanted ─────────────────────────────────┤
           ▼                                                                  │
        settling: each part of `due` is done and struck out, first `evaluate` │
           │      (a new best makes a save due), then `samples`; a stop gives │
           │      up the part that it finds, which stays in `due`             │
           ▼                                                                  │
        saving, if `save_due` or a stop is wanted: the checkpoint holds what  │
           │      is still `due`                                              │
           ├── no stop wanted: cleared ───────────────────────────────────────┘
           ▼
        `ended`: nothing more is logged or saved; out of time, the weights are evaluated once more for this session's result

    A resumed run begins as settling where its checkpoint has something `due`, and else as running. The log line may be a step
    late (`writes_late`); settling writes it first.
    """

    due: list[str] = field(default_factory=list)
    """What is still to do at the step that has ended: `evaluate`, `samples`."""
    save_due: bool = False
    """Whether a checkpoint belongs to that step, a stop aside."""
    ended: bool = False
    """Whether a stop has been obeyed: nothing more is logged or saved."""

    @property
    def pending(self) -> bool:
        """Whether the step has an end to be made, a stop aside."""
        return bool(self.due) or self.save_due

    def take_over(self, control: Any) -> None:
        """Note what transformers' control asks for, and take it from there."""
        if control.should_evaluate and "evaluate" not in self.due:
            self.due.insert(0, "evaluate")
        self.save_due |= control.should_save
        control.should_evaluate = control.should_save = False

    def clear(self) -> None:
        """Be done with the step."""
        self.due, self.save_due = [], False

    def state_dict(self) -> dict[str, Any]:
        """What is still due, for a checkpoint."""
        return {"due": [*self.due], "save_due": self.save_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have still due what a stop gave up. With nothing left of the step, its checkpoint is the one that was due."""
        self.due = [*state["due"]]
        self.save_due = state["save_due"] and bool(self.due)


class LogCounts:
    """What a trainer has counted for its log lines: the tokens so far, and the loss since the last line."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The numbers over all ranks, for a checkpoint."""
        return {
            "tokens": int(group.total(self.trainer.tokens_seen)),
            "loss_since_log": group.total(self.trainer._tr_loss) / group.world_size(),
            "last_log": self.trainer._globalstep_last_logged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint. Call it after transformers has begun to train, which sets its numbers to 0."""
        self.trainer.tokens_seen = state["tokens"] if group.is_first() else 0
        self.trainer._tr_loss += state["loss_since_log"]
        self.trainer._globalstep_last_logged = state["last_log"]


class EarlyStopping:
    """A trainer's EarlyStoppingCallback, if it has one."""

    def __init__(self, trainer: Any):
        from transformers import EarlyStoppingCallback

        callbacks = trainer.callback_handler.callbacks
        self.callback = next((c for c in callbacks if isinstance(c, EarlyStoppingCallback)), None)

    @property
    def out_of_patience(self) -> bool:
        """Whether the evaluations have not got better for as long as the settings allow."""
        callback = self.callback
        return callback is not None and callback.early_stopping_patience_counter >= callback.early_stopping_patience

    def state_dict(self) -> dict[str, Any]:
        """The evaluations in a row that were no better, for a checkpoint."""
        return {"patience_counter": self.callback.early_stopping_patience_counter if self.callback else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        if self.callback:
            self.callback.early_stopping_patience_counter = state["patience_counter"]
