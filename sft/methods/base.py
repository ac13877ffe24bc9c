"""What a run asks of its method. A method is a module with these names; sft/methods/sft.py is the first.

What is known of a method without torch (columns, metric, sequences of a row) stands in sft/config/method.py, for the checks
before a run and for whoever ranks runs.
"""

from typing import Any, Protocol

from sft.training.context import RunContext
from sft.training.trainer import Loop


class Method(Protocol):
    """A way to train a loaded model on prepared rows."""

    def build_trainer(self, ctx: RunContext, model: Any, loop: Loop) -> Any:
        """A transformers trainer over `ctx.prepared`, ready to train, with `plan`: the run's plan as it holds for this model.

        It goes on from `loop.checkpoint` if there is one. Raises Refusal where the model rules out what the settings ask for.
        """

    def held_out_loss(self, ctx: RunContext, trainer: Any) -> float:
        """The loss of the weights in memory that exports are compared on, by the rows of held_out.jsonl.

        It may keep there what else an export is compared with.
        """
