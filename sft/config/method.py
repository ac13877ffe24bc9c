"""What is known of a method without loading anything: for the checks before a run, and for whoever ranks runs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MethodFacts:
    """One method."""

    name: str
    columns: tuple[str, ...]
    """Columns of numbers of a tokenised row that it trains on."""
    metric: str = "eval_loss"
    """The number of metrics.jsonl and run.json that its runs are ranked by: best checkpoint, early stopping, sweeps, report."""
    title: str = "held-out loss"
    """What a reader calls it."""
    greater_is_better: bool = False
    sequences: int = 1
    """Sequences that a row puts through the model."""
    losses: tuple[str, ...] = ()
    """What `method.loss_type` can be."""

    @property
    def noun(self) -> str:
        """The metric in a word, `loss` or `reward`; also the key by which lines of metrics.jsonl have it of training."""
        return self.title.rpartition(" ")[2]

    def is_worse(self, value: float, other: float) -> bool:
        """Whether a value of the metric is worse than another by more than metrics.jsonl rounds."""
        return (other - value if self.greater_is_better else value - other) > 1e-6


SFT = MethodFacts("sft", ("input_ids", "labels"))
DPO = MethodFacts("dpo", ("input_ids", "labels", "rejected_ids", "rejected_labels"), sequences=2,
                  losses=("sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm"))  # fmt: skip
GRPO = MethodFacts("grpo", ("input_ids",), "eval_reward", "held-out reward", greater_is_better=True,
                   losses=("dapo", "dr_grpo", "grpo", "bnpo"))  # fmt: skip
METHODS = {method.name: method for method in (SFT, DPO, GRPO)}


def facts_of(run: dict[str, Any]) -> MethodFacts:
    """The method of the run with this run.json; one without a word on it is of supervised fine-tuning."""
    settings = run.get("settings")
    method = settings.get("method") if isinstance(settings, dict) else None
    name = method.get("name") if isinstance(method, dict) else None
    return METHODS.get(name, SFT) if isinstance(name, str) else SFT
