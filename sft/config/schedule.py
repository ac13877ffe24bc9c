"""The evaluation schedule: how often a run measures the held-out loss and completes prompts between its first and last step,
where the settings leave it open. Both take time from the training; before the first and after the last step they are never
left out. Imports nothing heavy.
"""

import math
from dataclasses import replace
from typing import Any

from sft.config.batching import effective_batch_size, planned_steps
from sft.config.schema import Settings, TrainerSettings

EVERY = 0.25
"""Share of all steps after which the held-out loss is measured in between."""

WORK = 0.1
"""Share of the training's work that evaluations in between may take."""

EVALUATED = 0.5
"""Work of an evaluated token against a trained one: a forward pass, where training also takes the gradients of the inputs."""

STEPS_A_TOKEN = 2
"""Steps of a run for each token of a completion, from which on there are completions in between: a token takes about a
fifteenth of a step of 8 rows, so that they take some 3 %."""


def with_eval_schedule(settings: Settings, facts: dict[str, Any]) -> Settings:
    """The settings with numbers in place of a null `trainer.eval_steps` and `samples.every_steps`.

    `facts` are those of the prepared data: `rows`, `train_tokens` and, where rows are held out, `eval_tokens`.
    """
    trainer, samples, rows = settings.trainer, settings.samples, facts["rows"]["train"]
    steps = planned_steps(trainer, rows, settings.method.num_iterations)
    if samples.every_steps is None:
        often = steps >= STEPS_A_TOKEN * samples.max_new_tokens
        samples = replace(samples, every_steps=0.5 if often else float(steps))
    if trainer.eval_steps is None:
        if trainer.early_stopping_patience or evaluation_work(trainer, steps, facts) <= WORK:
            trainer = replace(trainer, eval_steps=EVERY)
        else:  # one evaluation leaves nothing to choose from
            trainer = replace(trainer, eval_steps=float(steps), load_best_model_at_end=False)
    return replace(settings, trainer=trainer, samples=samples)


def evaluation_work(trainer: TrainerSettings, steps: int, facts: dict[str, Any]) -> float:
    """Work of the evaluations in between, at every quarter, as a share of what the training of `steps` steps takes."""
    between = -(-steps // steps_between(EVERY, steps)) - 1
    epochs = steps * effective_batch_size(trainer) / facts["rows"]["train"]
    return EVALUATED * between * facts.get("eval_tokens", 0) / (epochs * facts["train_tokens"])


def steps_between(every: float, total: int) -> int:
    """A number of steps as transformers counts it: a share of all steps if below 1, rounded up."""
    return math.ceil(total * every) if every < 1 else int(every)
