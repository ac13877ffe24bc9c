"""Rules for `method`: its own numbers, and what a method rules out. Imports nothing heavy."""

import math
from typing import Any

from sft.config.eligibility import OWN_LOSS
from sft.config.hardware import is_process_count, one_process, processes_of
from sft.config.keys import shown, typed
from sft.config.lora_rules import changes_base
from sft.config.method import METHODS
from sft.config.reward_rules import check_rewards
from sft.config.schema import (
    Backend,
    Bias,
    LoraSettings,
    LossOn,
    MethodLoss,
    MethodName,
    MethodSettings,
    Overlong,
    Reasoning,
    Reference,
    Settings,
    Shape,
    Strategy,
)
from sft.errors import Problem

OF_METHOD = {
    "beta": ("dpo", "grpo"),
    "loss_type": ("dpo", "grpo"),
    "reference": ("dpo", "grpo"),
    **dict.fromkeys(("label_smoothing", "sft_weight"), ("dpo",)),
    **dict.fromkeys(("num_generations", "max_completion_length", "temperature", "reward_funcs", "reward_weights",
                     "reward_options", "scale_rewards", "epsilon", "epsilon_high", "num_iterations",
                     "mask_truncated_completions", "max_idle_steps"), ("grpo",)),
}  # fmt: skip
"""The methods that read each key."""

OTHER_SAMPLER = "Log-probs of the tokens would be those of another sampler than the one that drew them."
OWN_ROLLOUTS = "Completions are written by the weights that train; there is no second engine."
OWN_REFERENCE = "The reference is the model without its adapter, or with the one that the run began with."
NO_ROLLOUT_SIZE = "Batch sizes count prompts, and each rollout is of one step's prompts."

NOT_OF_GRPO = {
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"), OTHER_SAMPLER),
    **dict.fromkeys(("steps_per_generation", "generation_batch_size", "num_generations_eval"), NO_ROLLOUT_SIZE),
    **dict.fromkeys(("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged", "cache_implementation"),
                    OWN_ROLLOUTS),
    **dict.fromkeys(("sync_ref_model", "disable_dropout"), OWN_REFERENCE),
    "use_liger_kernel": "The loss reads log-probs that are made without logits already.",
}  # fmt: skip
"""Options of TRL's GRPOConfig that have no place here, and why; besides those that begin with `vllm_` or `ref_model_`."""


def check_method(settings: Settings) -> list[Problem]:
    """What in `method` is out of range, would be ignored, or does not go with other settings."""
    problems = _check_keys(settings)
    if settings.method.name == MethodName.dpo:
        problems += [*_check_numbers(settings.method), *_check_others(settings)]
    if settings.method.name == MethodName.grpo:
        problems += [*_check_grpo_numbers(settings), *check_rewards(settings.method), *_check_grpo_others(settings)]
    return problems


def why_not_grpo(name: str) -> str:
    """Why an option of TRL's GRPOConfig in `trainer.extra` has no place in a run with `method=grpo`; empty for others."""
    if name.startswith("vllm_"):
        return OWN_ROLLOUTS
    return OWN_REFERENCE if name.startswith("ref_model_") else NOT_OF_GRPO.get(name, "")


def _check_keys(settings: Settings) -> list[Problem]:
    """Keys that the method does not read, and a loss of another one."""
    method, defaults, problems = settings.method, MethodSettings(), []
    for key, methods in OF_METHOD.items():
        value = getattr(method, key)
        if method.name.value in methods or value == getattr(defaults, key):
            continue
        why = f"It belongs to {' and '.join(f'method={name}' for name in methods)} and would be ignored."
        what = typed(f"method.{key}", value) if isinstance(value, list | dict) else f"method.{key}={shown(value)}"
        default = typed(f"method.{key}", getattr(defaults, key))
        fix = f"method={methods[0]}   or   leave method.{key} out" if method.name == MethodName.sft else default
        problems.append(Problem(what, why, fix))
    losses = METHODS[method.name.value].losses
    if losses and method.loss_type.value not in losses:
        why = f"method={method.name.value} has {', '.join(losses)}."
        problems.append(Problem(f"method.loss_type={method.loss_type.value}", why, f"method.loss_type={losses[0]}"))
    column = settings.dataset.columns.answer
    if method.name != MethodName.grpo and column not in (None, "answer"):
        why = "The reference answer belongs to method=grpo and would be ignored."
        problems.append(Problem(f"dataset.columns.answer={column}", why, "dataset.columns.answer=answer"))
    return problems


def _check_numbers(method: MethodSettings) -> list[Problem]:
    problems = []
    if not 0 < method.beta < math.inf:
        problems.append(Problem(f"method.beta={method.beta:g}", "It has to be above 0.", "method.beta=0.1"))
    if not 0 <= method.sft_weight < math.inf:
        problems.append(Problem(f"method.sft_weight={method.sft_weight:g}", "It has to be at least 0.", "method.sft_weight=0"))
    smoothing = method.label_smoothing
    if not 0 <= smoothing < 0.5:
        why = "It is the share of pairs that may be labelled the wrong way round: at least 0 and below 0.5."
        fix = "method.label_smoothing=0.1" if method.loss_type == MethodLoss.robust else "method.label_smoothing=0"
        problems.append(Problem(f"method.label_smoothing={smoothing:g}", why, fix))
    elif smoothing and method.loss_type != MethodLoss.robust:
        why = f"loss_type={method.loss_type.value} does not read it."
        fix = "method.loss_type=robust   or   method.label_smoothing=0"
        problems.append(Problem(f"method.label_smoothing={smoothing:g}", why, fix))
    return problems


def _check_grpo_numbers(settings: Settings) -> list[Problem]:
    """Plain ranges of what method=grpo reads, and the room for a completion."""
    method, limit = settings.method, settings.model.max_seq_length
    high = method.epsilon_high
    rules: list[tuple[str, bool, str, Any]] = [
        ("beta", 0 <= method.beta < math.inf, "at least 0", 0),
        ("num_generations", method.num_generations >= 2, "at least 2: completions of a prompt are compared", 8),
        ("max_completion_length", method.max_completion_length >= 1, "at least 1 token", 256),
        ("temperature", 0 < method.temperature < math.inf, "above 0: greedy completions of a prompt are all the same", 1),
        ("epsilon", 0 < method.epsilon < 1, "above 0 and below 1", 0.2),
        ("epsilon_high", high is None or 0 < high < math.inf, "above 0, or null", None),
        ("num_iterations", method.num_iterations >= 1, "at least 1", 1),
        ("max_idle_steps", method.max_idle_steps >= 1, "at least 1", 20),
    ]
    problems = [
        Problem(f"method.{key}={shown(getattr(method, key))}", f"It has to be {allowed}.", f"method.{key}={shown(fix)}")
        for key, holds, allowed, fix in rules
        if not holds
    ]
    if method.max_completion_length >= limit >= 8:
        what = f"method.max_completion_length={method.max_completion_length} model.max_seq_length={limit}"
        why = "Prompt and completion share model.max_seq_length, and no token is left for the prompt."
        fix = f"method.max_completion_length={limit // 2}   or   model.max_seq_length={2 * method.max_completion_length}"
        problems.append(Problem(what, why, fix))
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
        (_shares_weights(settings), "distributed.strategy=fsdp",
         "The weights of pairs are not shared out: each process has all of them.", _no_sharing(settings)),
    ]  # fmt: skip
    problems = [Problem(f"method=dpo {what}", why, fix) for holds, what, why, fix in rules if holds]
    if method.reference == Reference.base and (why := _why_no_base(lora)):
        problems.append(Problem("method.reference=base", why, "method.reference=start"))
    return problems + _other_losses(settings)


def _check_grpo_others(settings: Settings) -> list[Problem]:
    """What does not go with method=grpo."""
    data, lora, method = settings.dataset, settings.lora, settings.method
    beta = f"method.beta={method.beta:g}"
    rules: list[tuple[bool, str, str, str]] = [
        (settings.model.backend == Backend.unsloth, "model.backend=unsloth",
         "Unsloth replaces the parts of TRL and transformers that completions are written and trained by.",
         "model.backend=transformers"),
        (data.loss_on != LossOn.answer, f"dataset.loss_on={data.loss_on.value}",
         "No token of the data is trained on: the model learns from its own completions.", "dataset.loss_on=answer"),
        (data.overlong == Overlong.truncate, "dataset.overlong=truncate", "A prompt that is cut is another question.",
         "dataset.overlong=drop   or   dataset.overlong=error"),
        (data.shape == Shape.text, "dataset.shape=text", "A text as it stands has no prompt that could be answered.",
         "dataset.shape=auto"),
        (data.reasoning == Reasoning.split, "dataset.reasoning=split", "A row is one prompt, up to its last answer.",
         "dataset.reasoning=template   or   dataset.reasoning=strip"),
        (lora.enabled and lora.lora_dropout > 0, f"lora.lora_dropout={lora.lora_dropout:g}",
         "Completions are written without dropout: the model that learns from them would be another one.",
         "lora.lora_dropout=0"),
        (_shares_weights(settings), "distributed.strategy=fsdp",
         "Each process writes completions of its own and needs all of the weights.", _no_sharing(settings)),
        (method.beta > 0 and not lora.enabled, f"{beta} lora=none",
         "All weights are trained, and there is no adapter to switch off for the reference.",
         "method.beta=0   or   lora=default"),
        (method.beta > 0 and bool(lora.start_from) and method.reference == Reference.start, f"{beta} method.reference=start",
         "The adapter of lora.start_from is the one that changes, so that what the run began with is gone.",
         "method.reference=base   or   method.beta=0"),
        (method.beta == 0 and method.reference == Reference.base, "method.beta=0 method.reference=base",
         "With beta 0 no reference is read.", "method.reference=start   or   method.beta=0.04"),
    ]  # fmt: skip
    problems = [Problem(f"method=grpo {what}", why, fix) for holds, what, why, fix in rules if holds]
    if method.beta > 0 and lora.enabled and (why := _why_no_base(lora)):
        problems.append(Problem(f"method=grpo {beta}", why, "method.beta=0"))
    return problems + _other_losses(settings)


def _shares_weights(settings: Settings) -> bool:
    return settings.distributed.strategy == Strategy.fsdp and is_process_count(settings) and processes_of(settings) > 1


def _no_sharing(settings: Settings) -> str:
    return f"distributed.strategy=ddp   or   {one_process(settings)}"


def _why_no_base(lora: LoraSettings) -> str:
    """Why the model without its adapter cannot be had of the one in memory; empty if it can."""
    if not lora.enabled:
        return "All weights are trained, and there is no adapter to switch off: the run begins with the base."
    if changes_base(lora):
        return "The adapter's start is taken out of the model's weights: without it they are not those of the base."
    if lora.bias != Bias.none:
        return f"lora.bias={lora.bias.value} trains weights of the model itself, which cannot be switched off."
    return ""


def _other_losses(settings: Settings) -> list[Problem]:
    """Options of supervised fine-tuning that change its loss or what a batch is."""
    method, extra = settings.method.name, settings.trainer.extra
    grpo = method == MethodName.grpo
    refused = [name for name in OWN_LOSS if grpo and (why_not_grpo(name) or hasattr(settings.method, name))]
    return [
        Problem(f"method={method.value} trainer.extra.{name}={shown(extra[name])}", "It belongs to supervised fine-tuning.",
                f"leave trainer.extra.{name} out")
        for name in OWN_LOSS
        if extra.get(name) and name not in refused
    ]  # fmt: skip
