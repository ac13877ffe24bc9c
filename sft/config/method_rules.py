"""Rules for `method`: its own numbers, and what a method rules out. Imports nothing heavy."""

import math
from typing import Any

from sft.config.eligibility import OWN_LOSS
from sft.config.hardware import is_process_count, one_process, processes_of
from sft.config.lora_rules import changes_base
from sft.config.schema import (
    Backend,
    Bias,
    LoraSettings,
    LossOn,
    MethodName,
    MethodSettings,
    PreferenceLoss,
    Reasoning,
    Reference,
    Settings,
    Shape,
    Strategy,
)
from sft.errors import Problem


def check_method(settings: Settings) -> list[Problem]:
    """What in `method` is out of range, would be ignored, or does not go with other settings."""
    method = settings.method
    if method.name == MethodName.sft:
        defaults = MethodSettings()
        problems = []
        for key in ("beta", "loss_type", "label_smoothing", "sft_weight", "reference"):
            value = getattr(method, key)
            if value != getattr(defaults, key):
                why = "It belongs to method=dpo and would be ignored."
                shown = getattr(value, "value", value)
                problems.append(Problem(f"method.{key}={shown}", why, f"method=dpo   or leave method.{key} out"))
        return problems
    return [*_check_numbers(method), *_check_others(settings)]


def _check_numbers(method: MethodSettings) -> list[Problem]:
    problems = []
    if not 0 < method.beta < math.inf:
        problems.append(Problem(f"method.beta={method.beta:g}", "It has to be above 0.", "method.beta=0.1"))
    if not 0 <= method.sft_weight < math.inf:
        problems.append(Problem(f"method.sft_weight={method.sft_weight:g}", "It has to be at least 0.", "method.sft_weight=0"))
    smoothing = method.label_smoothing
    if not 0 <= smoothing < 0.5:
        why = "It is the share of pairs that may be labelled the wrong way round: at least 0 and below 0.5."
        fix = "method.label_smoothing=0.1" if method.loss_type == PreferenceLoss.robust else "method.label_smoothing=0"
        problems.append(Problem(f"method.label_smoothing={smoothing:g}", why, fix))
    elif smoothing and method.loss_type != PreferenceLoss.robust:
        why = f"loss_type={method.loss_type.value} does not read it."
        fix = "method.loss_type=robust   or   method.label_smoothing=0"
        problems.append(Problem(f"method.label_smoothing={smoothing:g}", why, fix))
    return problems


def _check_others(settings: Settings) -> list[Problem]:
    """What does not go with method=dpo."""
    data, lora, method = settings.dataset, settings.lora, settings.method
    rules: list[tuple[bool, str, str, str]] = [
        (settings.model.backend == Backend.unsloth, "model.backend=unsloth",
         "Unsloth replaces the parts of TRL and transformers that pairs are computed by.", "model.backend=transformers"),
        (data.loss_on == LossOn.all, "dataset.loss_on=all", "Only the two answers are compared.", "dataset.loss_on=answer"),
        (data.shape != Shape.auto, f"dataset.shape={data.shape.value}", "A pair is read by its columns chosen and rejected.",
         "dataset.shape=auto"),
        (data.reasoning == Reasoning.split, "dataset.reasoning=split", "A pair has one answer that is trained on already.",
         "dataset.reasoning=template   or   dataset.reasoning=strip"),
        (lora.enabled and lora.lora_dropout > 0, f"lora.lora_dropout={lora.lora_dropout:g}",
         "The reference has no dropout: the pairs would not begin as ties.", "lora.lora_dropout=0"),
        (settings.distributed.strategy == Strategy.fsdp and is_process_count(settings) and processes_of(settings) > 1,
         "distributed.strategy=fsdp", "The weights of pairs are not shared out: each process has all of them.",
         f"distributed.strategy=ddp   or   {one_process(settings)}"),
    ]  # fmt: skip
    problems = [Problem(f"method=dpo {what}", why, fix) for holds, what, why, fix in rules if holds]
    if method.reference == Reference.base and (why := _why_no_base(lora)):
        problems.append(Problem("method.reference=base", why, "method.reference=start"))
    return problems + [_other_loss(name, settings.trainer.extra[name]) for name in OWN_LOSS if settings.trainer.extra.get(name)]


def _why_no_base(lora: LoraSettings) -> str:
    """Why the model without its adapter cannot be had of the one in memory; empty if it can."""
    if not lora.enabled:
        return "All weights are trained, and there is no adapter to switch off: the run begins with the base."
    if changes_base(lora):
        return "The adapter's start is taken out of the model's weights: without it they are not those of the base."
    if lora.bias != Bias.none:
        return f"lora.bias={lora.bias.value} trains weights of the model itself, which cannot be switched off."
    return ""


def _other_loss(name: str, value: Any) -> Problem:
    return Problem(f"method=dpo trainer.extra.{name}={value}", "It belongs to supervised fine-tuning.",
                   f"leave trainer.extra.{name} out")  # fmt: skip
