"""The optimiser and the schedule, built once for a layer of one weight: what they lack is known before the model is loaded."""

import importlib.util
import inspect
import json
from typing import Any

from sft.config.keys import shown
from sft.config.schema import Settings
from sft.errors import Problem, first_line

# The package of an optimiser, by how its name begins.
PACKAGES = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
}

STEPS_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""What a schedule gets from the run and not from `lr_scheduler_kwargs`."""


def check_optimizer(settings: Settings, steps: int) -> list[Problem]:
    """Problems of the optimiser and the schedule of a run of `steps` steps."""
    import torch

    stub = torch.nn.Linear(1, 1, bias=False)
    problems = _check_optim(settings, stub)
    optimizer = torch.optim.SGD(stub.parameters(), lr=settings.trainer.learning_rate)
    return problems + _check_schedule(settings, optimizer, max(1, steps))


def _check_optim(settings: Settings, stub: Any) -> list[Problem]:
    from transformers import Trainer, TrainingArguments

    trainer, plain = settings.trainer, "trainer.optim=adamw_torch"
    what = f"trainer.optim={trainer.optim}"
    module, package = next((names for start, names in PACKAGES.items() if trainer.optim.startswith(start)), (None, None))
    if module and importlib.util.find_spec(module) is None:
        return [
            Problem(what, f"It needs the package {package}, which is not installed.", f"pip install {package}   or   {plain}")
        ]
    # Without __init__, which would look for devices and other processes.
    arguments = TrainingArguments.__new__(TrainingArguments)
    arguments.__dict__ |= {"learning_rate": trainer.learning_rate, "weight_decay": trainer.weight_decay, "optim": trainer.optim}
    arguments.__dict__ |= {"gradient_accumulation_steps": trainer.gradient_accumulation_steps or 1, **trainer.extra}
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, stub)
        weights = next((options.pop(key) for key in ("params", "model", "optimizer_dict") if key in options), stub.parameters())
        kind(weights, **options)
    # Each of them is what transformers or an optimiser's own constructor raises for an option or a package that is not there.
    except (ImportError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        why = first_line(error)
        if "No target modules found" in why:  # in this layer
            return []
        fix = plain
        if "optim_target_modules" in why:
            fix = f"'trainer.extra.optim_target_modules=[attn,mlp]'   or   {plain}"
        elif trainer.extra.get("optim_args"):
            what, fix = f"{what} trainer.extra.optim_args={trainer.extra['optim_args']}", "leave trainer.extra.optim_args out"
        return [Problem(what, f"It cannot be made: {why}", fix)]
    return []


def _check_schedule(settings: Settings, optimizer: Any, steps: int) -> list[Problem]:
    from transformers import get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    trainer = settings.trainer
    name, given = trainer.lr_scheduler_type, trainer.extra.get("lr_scheduler_kwargs") or {}
    what = f"trainer.lr_scheduler_type={name}"
    if given:
        what += f" trainer.extra.lr_scheduler_kwargs={shown(given)}"
    warmup = int(trainer.warmup_steps if trainer.warmup_steps >= 1 else steps * trainer.warmup_steps)
    taken = [key for key in inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters if key not in STEPS_GIVEN]
    leave_out = "leave trainer.extra.lr_scheduler_kwargs out"
    try:
        options = json.loads(given) if isinstance(given, str) else dict(given)
        if options and (not taken or name.startswith("constant")):
            return [Problem(what, "This schedule takes no options, so that they would be ignored.", leave_out)]
        get_scheduler(name, optimizer, warmup, steps, options)
    except (ValueError, TypeError) as error:
        why, needed = f"It cannot be made: {first_line(error)}", ""
        if "min_lr" in taken and not {"min_lr", "min_lr_rate"} & set(given):
            needed = f"min_lr:{trainer.learning_rate / 10:g}"
        elif "num_decay_steps" in taken and "num_decay_steps" not in given:
            needed = f"num_decay_steps:{max(1, steps // 10)}"
        if needed:
            return [Problem(what, why, f"'trainer.extra.lr_scheduler_kwargs={{{needed}}}'   or another number")]
        return [Problem(what, why, f"{leave_out}, or set of: {', '.join(taken)}" if taken else leave_out)]
    return []
