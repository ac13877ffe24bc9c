"""The batch plan: how the rows of one optimiser step are cut into micro-batches. Imports nothing heavy.

`per_device_train_batch_size` rows go through the model at a time, `gradient_accumulation_steps` times a step. The product
decides what the model learns: the loss of a step is a sum over its target tokens divided by their number, however it is cut.
Several processes share the micro-batches of a step out among them, so that the product stays what it is.
"""

from dataclasses import dataclass, replace
from typing import Any

from sft.config.schema import Settings, TrainerSettings
from sft.errors import Problem

AUTO = "auto"

ACCUMULATION, EFFECTIVE, CPU_ROWS = 4, 8, 2
"""Micro-batches a step where nothing says how many; rows a step for `auto`; rows a micro-batch for `auto` on the CPU."""

EVAL_ROWS, MOST_EVAL_ROWS, EVAL_TOKENS = 4, 256, 8_192
"""Rows of a micro-batch in an evaluation; most of them, and their tokens, padding-free on a GPU. It keeps nothing for a
backward pass: 8B takes up to 1 GiB for these tokens (three times the MLP's width). More of them save no time: an H100 computes
them far longer than a host takes to launch their kernels."""


@dataclass(frozen=True)
class BatchPlan:
    """What is decided for a run."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool | None
    """None leaves it to `models.uses_checkpointing`."""
    every_n_layers: int = 1
    """With checkpointing one of so many layers is recomputed for the backward pass, and the others are kept."""

    @property
    def effective_batch_size(self) -> int:
        """Rows in one optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def is_auto(trainer: TrainerSettings) -> bool:
    """Whether the rows of a micro-batch are to be chosen by the memory there is."""
    return trainer.per_device_train_batch_size == AUTO


def effective_batch_size(trainer: TrainerSettings) -> int:
    """Rows in one optimiser step, known before it is cut into micro-batches."""
    if trainer.effective_batch_size:
        return trainer.effective_batch_size
    return (
        EFFECTIVE
        if is_auto(trainer)
        else trainer.per_device_train_batch_size * (trainer.gradient_accumulation_steps or ACCUMULATION)
    )


def eval_rows(trainer: TrainerSettings, lengths: Any = None, processes: int = 1) -> int:
    """Rows in one micro-batch of an evaluation.

    `lengths`: tokens of each row, an array in the order of the rows, where they are padding-free on a GPU. As many rows then
    make a micro-batch as have no more than EVAL_TOKENS in any of them, and leave one to each process.
    """
    import numpy as np

    if trainer.per_device_eval_batch_size or lengths is None:
        return trainer.per_device_eval_batch_size or EVAL_ROWS
    most = min(MOST_EVAL_ROWS, -(-len(lengths) // processes))
    fits = (n for n in range(most, 1, -1) if np.add.reduceat(lengths, range(0, len(lengths), n)).max() <= EVAL_TOKENS)
    return next(fits, 1)


def planned_steps(trainer: TrainerSettings, rows: int, updates: int = 1) -> int:
    """Optimiser steps that a run over `rows` training rows takes, if nothing stops it; each batch is good for so many
    `updates`.
    """
    each = -(-rows // effective_batch_size(trainer)) * updates
    return trainer.max_steps if trainer.max_steps > 0 else -int(-trainer.num_train_epochs * each // 1)


def batch_plan_of(
    trainer: TrainerSettings, rows: int | None = None, checkpointing: bool | None = None, every_n_layers: int = 1
) -> BatchPlan:
    """The batch plan of these settings; `rows` is what was chosen for `auto`."""
    rows = rows or trainer.per_device_train_batch_size
    return BatchPlan(rows, effective_batch_size(trainer) // rows, checkpointing, every_n_layers)


def candidates(trainer: TrainerSettings, processes: int = 1) -> list[int]:
    """Rows of a micro-batch that make up the effective batch evenly, with as many of them on each process, most first."""
    total = effective_batch_size(trainer)
    if trainer.gradient_accumulation_steps:
        return [total // trainer.gradient_accumulation_steps]
    return [n for n in range(total, 0, -1) if total % (n * processes) == 0]


def with_batch_plan(settings: Settings, plan: BatchPlan) -> Settings:
    """The settings with plain numbers in place of `auto` and null."""
    extra = settings.trainer.extra
    if plan.every_n_layers > 1:
        more = {"use_reentrant": False, **(extra.get("gradient_checkpointing_kwargs") or {})}
        extra = {**extra, "gradient_checkpointing_kwargs": {**more, "every_n_layers": plan.every_n_layers}}
    trainer = replace(
        settings.trainer,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        effective_batch_size=plan.effective_batch_size,
        gradient_checkpointing=plan.gradient_checkpointing,
        extra=extra,
    )
    return replace(settings, trainer=trainer)


def check_batch_plan(trainer: TrainerSettings, processes: int = 1) -> list[Problem]:
    """What of the three settings contradicts another, would be ignored, or cannot be shared out evenly among the processes."""
    rows, micro_batches, total = (
        trainer.per_device_train_batch_size,
        trainer.gradient_accumulation_steps,
        trainer.effective_batch_size,
    )
    key = f"trainer.per_device_train_batch_size={rows}"
    if isinstance(rows, str) and rows != AUTO:
        return [Problem(key, "It is neither a whole number nor auto.", "trainer.per_device_train_batch_size=auto")]
    if any(isinstance(n, int) and n < 1 for n in (rows, micro_batches, total)):
        return []  # refused as numbers
    freed = "trainer.gradient_accumulation_steps=null"
    if rows == AUTO:
        if micro_batches is None:
            return _check_shares(trainer, 1, processes)
        if total and total % micro_batches == 0:
            return _check_shares(trainer, total // micro_batches, processes)
        what = f"{key} trainer.gradient_accumulation_steps={micro_batches}" + (
            f" trainer.effective_batch_size={total}" if total else ""
        )
        why = (
            f"{total} rows cannot be made of {micro_batches} micro-batches."
            if total
            else "It does not say how many rows a step has."
        )
        fix = f"trainer.effective_batch_size={micro_batches * max(1, round((total or 2 * micro_batches) / micro_batches))}"
        fix += f"\n{freed}   auto chooses the micro-batches: trainer.effective_batch_size={total or EFFECTIVE}"
        return [Problem(what, why, fix)]
    if total is None:
        return _check_shares(trainer, rows, processes)
    what = f"{key} trainer.effective_batch_size={total}"
    if micro_batches is not None and rows * micro_batches != total:
        why = f"{rows} rows x {micro_batches} micro-batches are {rows * micro_batches} rows a step, not {total}."
        fix = f"{freed}   follows the effective batch size\ntrainer.effective_batch_size={rows * micro_batches}"
        return [Problem(f"{what} trainer.gradient_accumulation_steps={micro_batches}", why, fix)]
    if total % rows:
        best = max(n for n in range(1, min(rows, total) + 1) if total % n == 0)
        why = f"{total} rows cannot be made of micro-batches of {rows}."
        fix = f"trainer.per_device_train_batch_size={best}\ntrainer.effective_batch_size={max(1, round(total / rows)) * rows}"
        return [Problem(what, why, fix)]
    return _check_shares(trainer, rows, processes)


def _check_shares(trainer: TrainerSettings, rows: int, processes: int) -> list[Problem]:
    """Why the rows of a step cannot be dealt out in micro-batches of `rows`, as many to each process."""
    total = effective_batch_size(trainer)
    if total % (rows * processes) == 0:
        return []
    smaller = next((n for n in range(rows, 0, -1) if total % (n * processes) == 0), None)
    more = -(-total // (rows * processes)) * rows * processes
    freed = "trainer.gradient_accumulation_steps=null "
    fix = f"{freed}trainer.per_device_train_batch_size={smaller} trainer.effective_batch_size={total}\n" if smaller else ""
    fix += f"{freed}trainer.effective_batch_size={more}   learns from more rows a step"
    why = f"{total} rows a step cannot be shared out evenly among {processes} processes in micro-batches of {rows}."
    return [Problem(f"{processes} processes, {total} rows a step", why, fix)]
