"""How the rows of one optimiser step are split into forward passes. Imports nothing heavy.

`per_device_train_batch_size` rows go through the model at a time, `gradient_accumulation_steps` times a step. The product
decides what is learnt: the loss of a step is a sum over its learnt tokens divided by their number, however they are split.
Several processes share the passes of a step out among them, so that the product stays what it is.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft.errors import Problem
from sft.settings import Backend, Settings, Strategy, TrainerSettings

AUTO = "auto"
ACCUMULATION, EFFECTIVE, CPU_ROWS = 4, 8, 2
"""Forward passes where nothing says how many; rows a step for `auto`; rows a pass that `auto` takes on the CPU."""
EVAL_ROWS, MOST_EVAL_ROWS, EVAL_TOKENS = 4, 256, 8_192
"""Rows of a pass in an evaluation; most of them, and their tokens, if they lie end to end on a GPU. It keeps nothing for a
backward pass: 8B takes up to 1 GiB for these tokens (three times the MLP's width). More of them save no time: an H100 computes
them far longer than a host takes to launch the pass."""

OWN_LOSS = ("loss_type", "label_smoothing_factor", "use_liger_kernel", "neftune_noise_alpha", "packing", "padding_free",
            "completion_only_loss", "assistant_only_loss", "chunk_size", "group_by_length")  # fmt: skip
"""Options of `trainer.extra` that change the loss or what a batch is; they keep TRL's own way."""


@dataclass(frozen=True)
class Split:
    """What is decided for a run."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool | None
    """None leaves it to `models.uses_checkpointing`."""
    every_n_layers: int = 1
    """With checkpointing one of so many layers is computed again for the backward pass, and the others are kept."""

    @property
    def effective_batch_size(self) -> int:
        """Rows in one optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def is_auto(trainer: TrainerSettings) -> bool:
    """Whether the rows of a pass are to be chosen by the memory there is."""
    return trainer.per_device_train_batch_size == AUTO


def effective_batch_size(trainer: TrainerSettings) -> int:
    """Rows in one optimiser step, known before they are split."""
    if trainer.effective_batch_size:
        return trainer.effective_batch_size
    return (
        EFFECTIVE
        if is_auto(trainer)
        else trainer.per_device_train_batch_size * (trainer.gradient_accumulation_steps or ACCUMULATION)
    )


def eval_rows(trainer: TrainerSettings, lengths: Any = None, processes: int = 1) -> int:
    """Rows in one forward pass of an evaluation.

    `lengths`: tokens of each row, an array in the order of the rows, where these lie end to end on a GPU. As many rows then
    make a pass as have no more than EVAL_TOKENS in any of the passes, and leave a pass to each process.
    """
    import numpy as np

    if trainer.per_device_eval_batch_size or lengths is None:
        return trainer.per_device_eval_batch_size or EVAL_ROWS
    most = min(MOST_EVAL_ROWS, -(-len(lengths) // processes))
    fits = (n for n in range(most, 1, -1) if np.add.reduceat(lengths, range(0, len(lengths), n)).max() <= EVAL_TOKENS)
    return next(fits, 1)


def planned_steps(trainer: TrainerSettings, rows: int) -> int:
    """Optimiser steps that a run over `rows` training rows takes, if nothing stops it."""
    each = -(-rows // effective_batch_size(trainer))
    return trainer.max_steps if trainer.max_steps > 0 else -int(-trainer.num_train_epochs * each // 1)


def split_of(
    trainer: TrainerSettings, rows: int | None = None, checkpointing: bool | None = None, every_n_layers: int = 1
) -> Split:
    """The split of these settings; `rows` is what was chosen for `auto`."""
    rows = rows or trainer.per_device_train_batch_size
    return Split(rows, effective_batch_size(trainer) // rows, checkpointing, every_n_layers)


def candidates(trainer: TrainerSettings, processes: int = 1) -> list[int]:
    """Rows of a pass that make up the effective batch evenly, in as many passes on each process, most first."""
    total = effective_batch_size(trainer)
    if trainer.gradient_accumulation_steps:
        return [total // trainer.gradient_accumulation_steps]
    return [n for n in range(total, 0, -1) if total % (n * processes) == 0]


def deal_evenly(rows: Sequence[int], lengths: Sequence[int], rows_a_pass: int) -> list[list[int]]:
    """The rows of a step in passes of `rows_a_pass` (the last one may have fewer), with about as many tokens in each pass.

    `lengths[row]` are the tokens of a row. The longest row left goes to the pass with the fewest tokens that has room (Graham's
    rule, 1969); inside a pass rows keep their order.
    """
    room = [min(rows_a_pass, len(rows) - start) for start in range(0, len(rows), rows_a_pass)]
    passes: list[list[int]] = [[] for _ in room]
    tokens = [0] * len(room)
    for at in sorted(range(len(rows)), key=lambda at: -lengths[rows[at]]):
        i = min((i for i in range(len(room)) if len(passes[i]) < room[i]), key=tokens.__getitem__)
        passes[i].append(at)
        tokens[i] += lengths[rows[at]]
    return [[rows[at] for at in sorted(one)] for one in passes]


class EvenPasses:
    """A sampler that gives the rows of another one, in the same steps, with about as many tokens in each pass of a step.

    What is learnt stays the same. The largest pass takes less memory, and where several processes share the passes of a step,
    none waits long for another: as they come, the larger of two passes has some 10 % more tokens than the mean.
    """

    def __init__(self, sampler: Any, lengths: Sequence[int], rows_a_pass: int, passes: int):
        """`lengths` are the tokens of each row that `sampler` names; a step has `passes` passes of `rows_a_pass` rows."""
        self.sampler, self.lengths, self.rows_a_pass, self.passes = sampler, lengths, rows_a_pass, passes

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows = iter(self.sampler)
        while step := list(itertools.islice(rows, self.rows_a_pass * self.passes)):
            yield from itertools.chain.from_iterable(deal_evenly(step, self.lengths, self.rows_a_pass))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as of this epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def with_split(settings: Settings, split: Split) -> Settings:
    """The settings with plain numbers in place of `auto` and null."""
    extra = settings.trainer.extra
    if split.every_n_layers > 1:
        more = {"use_reentrant": False, **(extra.get("gradient_checkpointing_kwargs") or {})}
        extra = {**extra, "gradient_checkpointing_kwargs": {**more, "every_n_layers": split.every_n_layers}}
    trainer = replace(
        settings.trainer,
        per_device_train_batch_size=split.per_device_train_batch_size,
        gradient_accumulation_steps=split.gradient_accumulation_steps,
        effective_batch_size=split.effective_batch_size,
        gradient_checkpointing=split.gradient_checkpointing,
        extra=extra,
    )
    return replace(settings, trainer=trainer)


def check_split(trainer: TrainerSettings, processes: int = 1) -> list[Problem]:
    """What of the three settings contradicts another, would be ignored, or cannot be shared out evenly among the processes."""
    rows, passes, total = (
        trainer.per_device_train_batch_size,
        trainer.gradient_accumulation_steps,
        trainer.effective_batch_size,
    )
    key = f"trainer.per_device_train_batch_size={rows}"
    if isinstance(rows, str) and rows != AUTO:
        return [Problem(key, "It is neither a whole number nor auto.", "trainer.per_device_train_batch_size=auto")]
    if any(isinstance(n, int) and n < 1 for n in (rows, passes, total)):
        return []  # refused as numbers
    freed = "trainer.gradient_accumulation_steps=null"
    if rows == AUTO:
        if passes is None:
            return _check_shares(trainer, 1, processes)
        if total and total % passes == 0:
            return _check_shares(trainer, total // passes, processes)
        what = f"{key} trainer.gradient_accumulation_steps={passes}" + (
            f" trainer.effective_batch_size={total}" if total else ""
        )
        why = f"{total} rows cannot be made of {passes} passes." if total else "It does not say how many rows a step has."
        fix = f"trainer.effective_batch_size={passes * max(1, round((total or 2 * passes) / passes))}"
        fix += f"\n{freed}   auto chooses the passes: trainer.effective_batch_size={total or EFFECTIVE}"
        return [Problem(what, why, fix)]
    if total is None:
        return _check_shares(trainer, rows, processes)
    what = f"{key} trainer.effective_batch_size={total}"
    if passes is not None and rows * passes != total:
        why = f"{rows} rows x {passes} passes are {rows * passes} rows a step, not {total}."
        fix = f"{freed}   follows the effective batch size\ntrainer.effective_batch_size={rows * passes}"
        return [Problem(f"{what} trainer.gradient_accumulation_steps={passes}", why, fix)]
    if total % rows:
        best = max(n for n in range(1, min(rows, total) + 1) if total % n == 0)
        why = f"{total} rows cannot be made of passes of {rows}."
        fix = f"trainer.per_device_train_batch_size={best}\ntrainer.effective_batch_size={max(1, round(total / rows)) * rows}"
        return [Problem(what, why, fix)]
    return _check_shares(trainer, rows, processes)


def _check_shares(trainer: TrainerSettings, rows: int, processes: int) -> list[Problem]:
    """Why the rows of a step cannot be dealt out in passes of `rows`, as many to each process."""
    total = effective_batch_size(trainer)
    if total % (rows * processes) == 0:
        return []
    smaller = next((n for n in range(rows, 0, -1) if total % (n * processes) == 0), None)
    more = -(-total // (rows * processes)) * rows * processes
    freed = "trainer.gradient_accumulation_steps=null "
    fix = f"{freed}trainer.per_device_train_batch_size={smaller} trainer.effective_batch_size={total}\n" if smaller else ""
    fix += f"{freed}trainer.effective_batch_size={more}   learns from more rows a step"
    why = f"{total} rows a step cannot be shared out evenly among {processes} processes in passes of {rows}."
    return [Problem(f"{processes} processes, {total} rows a step", why, fix)]


COMPILED_FROM = 500_000
"""Tokens of training from which compiling the layers pays. Compiling takes some 15 s of an 8B shape, and saves a
third of a replayed step."""


def is_compiled(trainer: TrainerSettings, tokens: float) -> bool:
    """Whether the layers of a run of so many tokens are compiled, if its rows lie end to end on a GPU."""
    return trainer.torch_compile or (trainer.torch_compile is None and tokens >= COMPILED_FROM)


def why_padded(settings: Settings, backend: str) -> str:
    """What in the settings keeps rows from being laid end to end; empty if nothing does. A model may have reasons too."""
    if settings.trainer.padding_free is False:
        return "trainer.padding_free=false"
    if backend != "transformers":
        return "model.backend=unsloth has a way of its own"
    if settings.distributed.strategy == Strategy.fsdp:
        return "distributed.strategy=fsdp wraps the layers"
    own = [key for key in OWN_LOSS if settings.trainer.extra.get(key)]
    if own:
        return f"trainer.extra.{own[0]} has a loss or a batch of its own"
    if settings.model.attn_implementation.value != "auto":
        return f"model.attn_implementation={settings.model.attn_implementation.value} is asked for"
    return ""


def check_speed(settings: Settings, backend: str, gpu: bool) -> list[Problem]:
    """What asks for rows end to end, compiled layers or recorded passes where they cannot be had."""
    backend = "transformers" if settings.model.backend == Backend.auto else backend  # which it can come to
    trainer, why, problems = settings.trainer, why_padded(settings, backend), []
    if trainer.padding_free and why:
        fix = "trainer.padding_free=null   pads where it has to"
        problems.append(Problem("trainer.padding_free=true", f"Rows cannot be laid end to end: {why}.", fix))
    if not gpu:
        why = "this machine has no GPU, and only for one are kernels compiled and launched"
    if 1 <= (trainer.max_memory_gib or 0) < float("inf") and not gpu:
        why_not = "It limits a GPU's memory, and this machine has no GPU."
        problems.append(Problem(f"trainer.max_memory_gib={trainer.max_memory_gib:g}", why_not, "trainer.max_memory_gib=null"))
    if trainer.torch_compile and why:
        why_not = f"It needs rows end to end on a GPU, but {why}."
        problems.append(Problem("trainer.torch_compile=true", why_not, "trainer.torch_compile=null"))
    why = why or why_launched(settings)
    if trainer.cuda_graphs and why:
        why_not = f"It needs rows end to end on a GPU, each pass like the one before, but {why}."
        problems.append(Problem("trainer.cuda_graphs=true", why_not, "trainer.cuda_graphs=null"))
    return problems


def why_launched(settings: Settings) -> str:
    """What in the settings keeps passes from being recorded as CUDA graphs; empty if nothing does."""
    if settings.lora.enabled and settings.lora.lora_dropout:
        return f"lora.lora_dropout={settings.lora.lora_dropout:g} draws anew in every pass"
    return ""
