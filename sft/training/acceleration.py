"""What makes a run fast without changing what it computes, and whether this run can have it.

Padding-free rows (model/padding_free.py) where the model's attention allows it, which is tried on the first rows before it is
believed; on a GPU micro-batches captured as CUDA graphs (model/cuda_graphs.py), and decoder layers compiled where the run is
long enough to repay that.
"""

import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sft.config.batching import eval_rows
from sft.config.eligibility import check_padded
from sft.config.schema import Settings, TrainerSettings
from sft.data import collators, tokenize
from sft.data.token_cache import token_counts
from sft.distributed import group, watchdog
from sft.errors import Refusal
from sft.model import cuda_graphs, padding_free, structure, warm_cache
from sft.model.backend import torch_dtype
from sft.model.compilation import compile_layers, keep_kernels
from sft.model.fused_layers import fused_inference
from sft.model.structure import base_of, decoder_layers
from sft.plan.plan import Plan
from sft.training.samplers import balance_micro_batches

log = logging.getLogger(__name__)

TOLERANCE = {4: 1e-4, 2: 1e-2}
"""Share by which the loss of the first rows may differ, by the bytes of an activation."""

HIDDEN = {4: 1e-4, 2: 1e-1}
"""The same for the last hidden states of a row, as a share of their norm: kernels of two kinds round differently in 16 bits."""

SEEN = 1e-6
"""The same where another row's tokens are replaced, in any type: nothing moves, since a token is computed in the same way. In a
mixture of experts, and in 8 bits, what is multiplied together depends on the other tokens."""

CHECKED = 256
"""Tokens of a row that are compared. The model's own loss has all logits of them at once: of long rows these can take more
memory than the training that is made sure of."""

NUM_LENGTHS = 16
"""Lengths that micro-batches are captured for. Each takes about half a second on an H100 (8B shape)."""

REPLAYS_A_LENGTH = 10
"""Micro-batches of a run for each of them, at least: replaying one saved 60 to 200 ms there."""


def warm_up(plan: Plan) -> None:
    """Start the processes that will compile kernels, if any will: they come up while the weights are read."""
    import torch

    if torch.cuda.is_available() and plan.compiled:
        keep_kernels()
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


def settle(model: Any, settings: Settings, data: Any, pad_token_id: int, plan: Plan, segments: int = 1) -> Plan:
    """Prepare a loaded model with its adapter on, and return the plan as it holds for it. A row is so many `segments` of
    attention.

    Raises Refusal where `trainer.padding_free`, `trainer.torch_compile` or `trainer.cuda_graphs` is true and cannot be had.
    """
    trainer, base = settings.trainer, base_of(model)
    why_not = plan.why_padded or padding_free.obstacle(base)
    if not why_not:
        padding_free.install(base)
        first = _first_rows(data.train)
        dtype = torch_dtype(plan.dtype)
        with _exact_products(base, settings):
            found = warm_cache.checked(model, settings, first, lambda: _difference(model, first, pad_token_id, dtype))
        reasons = group.gathered(found)
        why_not = next(filter(None, reasons), "")
    if why_not:
        _refuse_requested(trainer, why_not)
        if trainer.padding_free is None and plan.backend == "transformers":
            log.info("Speed  rows are padded: %s", why_not)
        return plan.padded(why_not, eval_rows(trainer))
    on_gpu, sizes = base.device.type == "cuda", ()
    if on_gpu and settings.model.load_in_4bit:
        from sft.model.nf4 import open_layers

        open_layers(base)
    if plan.compiled:
        compile_layers(base)
    if plan.captured:
        rows, micro_batches = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
        most = cuda_graphs.launch_bound_tokens(decoder_layers(base)[0])
        count = max(1, min(NUM_LENGTHS, plan.steps * micro_batches // REPLAYS_A_LENGTH))
        # Layers are recomputed where the memory is short: beside a captured step there is no room for an eager one.
        lengths = token_counts(data.train).tolist()
        sizes = choose_lengths(lengths, rows, micro_batches, count, most, whole=plan.checkpointing)
        if trainer.cuda_graphs and not sizes:
            log.warning("trainer.cuda_graphs is ignored: most micro-batches are so long that the GPU never waits for the host.")
        if sizes:
            what, ends = [sizes, rows, segments, plan.compiled], segments * rows + 2
            base.graphs = warm_cache.captured_steps(model, settings, what, lambda: cuda_graphs.GraphPool(base, sizes, ends))
    words = ["padding-free rows"] + ["layers compiled"] * plan.compiled
    words += [f"micro-batches of {', '.join(map(str, sizes))} tokens replayed as CUDA graphs"] * bool(sizes)
    log.info("Speed  %s", "; ".join(words))
    return replace(plan, captured=bool(sizes), capture_sizes=sizes)


def _refuse_requested(trainer: TrainerSettings, why_not: str) -> None:
    """Raise Refusal if a setting asks for what rows with padding cannot have."""
    problems = check_padded(trainer, why_not)
    if not problems:
        return
    if not group.is_first():
        watchdog.wait_for_end()  # all found the same; the first process refuses for all
    raise Refusal(problems)


def choose_lengths(
    lengths: list[int], rows: int, micro_batches: int, count: int = NUM_LENGTHS, most: int | None = None, whole: bool = False
) -> tuple[int, ...]:
    """At most `count` lengths, multiples of 64, that micro-batches of `rows` rows drawn from `lengths`, `micro_batches` a step,
    are padded to.

    Of a thousand drawn ones those longer than `most` and the five longest get no length; the others are padded with the
    fewest tokens that `count` lengths allow (found exactly, by dynamic programming over where the lengths may end). No lengths
    if most are longer than `most`. With `whole` every micro-batch gets one, also that of the longest rows there are.
    """
    draw = random.Random(0)
    steps = [draw.choices(range(len(lengths)), k=rows * micro_batches) for _ in range(-(-1000 // micro_batches))]
    drawn = [sum(lengths[row] for row in one) for step in steps for one in balance_micro_batches(step, lengths, rows)]
    sums = sorted(-(-tokens // 64) * 64 for tokens in drawn[:1000])[: None if whole else 995]
    if whole:
        sums.append(-(-sum(sorted(lengths)[-rows:]) // 64) * 64)
    waiting = [n for n in sums if most is None or n <= most]
    if len(waiting) < len(sums) / 2:
        return ()
    if not whole:
        sums = waiting
    ends = sorted(set(sums))
    below = [sum(n <= end for n in sums) for end in ends]
    best: list[tuple[int, tuple[int, ...]]] = [(end * b, (end,)) for end, b in zip(ends, below, strict=True)]
    for _ in range(count - 1):  # best[i]: tokens of all micro-batches up to ends[i], which is the last length
        best = [
            min([best[i], *((best[k][0] + ends[i] * (below[i] - below[k]), (*best[k][1], ends[i])) for k in range(i))])
            for i in range(len(ends))
        ]
    return best[-1][1]


@contextlib.contextmanager
def evaluating(model: Any, plan: Plan) -> Iterator[None]:
    """Inside the block compiled layers run as they were written, for lengths that nothing was compiled for; on a GPU, where
    the run is padding-free, in fewer kernels. Not for gradients.
    """
    import torch

    base = base_of(model)
    light = plan.padding_free and base.device.type == "cuda"
    as_written = torch.compiler.set_stance("force_eager") if plan.compiled else contextlib.nullcontext()
    with as_written, fused_inference(base) if light else contextlib.nullcontext():
        yield


def _exact_products(base: Any, settings: Settings) -> Any:
    """A block in which FP8 layers round nothing but their weights: their noise would be taken for another row's tokens."""
    if not settings.model.load_in_fp8:
        return contextlib.nullcontext()
    from sft.model.fp8 import inputs_in_16_bits

    return inputs_in_16_bits(base)


def _first_rows(data: Any) -> list[dict[str, list[int]]]:
    """The ends of the three shortest of the first eight rows: the model's own loss holds a value for each token and word."""
    rows = sorted((data[i] for i in range(min(8, len(data)))), key=lambda row: len(row["input_ids"]))[:3]
    ends = [(row["input_ids"][-CHECKED:], row.get("labels", row["input_ids"])[-CHECKED:]) for row in rows]
    return [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in ends]


def _difference(model: Any, rows: list[dict[str, list[int]]], pad_token_id: int, dtype: Any) -> str:
    """Compare a few rows, padding-free, with what the model's own forward pass gives for each alone; empty if they agree.
    `dtype` is the type that is computed in.

    Their loss shows another normalisation or an output layer of the model's own; the hidden states of the second row and the
    third show whether it is the model's own attention. That no token sees another row is shown by these once more, with other
    tokens in the first row: rounding hides a small leak from a comparison with the row alone, and not from this one.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    inputs = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for key, value in collators.PaddingFreeCollator(pad_token_id, longest)(rows).items()
    }
    training, base = model.training, base_of(model)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype.itemsize == 2):
            whole = model(**inputs).loss.item()
            ends = inputs["cu_seq_lens_q"].tolist()
            passed = {key: inputs[key] for key in inputs if key not in ("labels", "target_positions", "targets")}
            with structure.attention_of(base, padding_free.ATTENTION):
                states = base.base_model(**passed, use_cache=False).last_hidden_state[0].float()
                first, end, seen = ends[1], ends[len(rows)], 0.0
                if end > first:  # of several rows, of which the first is the shortest
                    passed["input_ids"] = passed["input_ids"].clone()
                    passed["input_ids"][0, :first] = passed["input_ids"][0, first : 2 * first].flip(0)
                    moved = states - base.base_model(**passed, use_cache=False).last_hidden_state[0].float()
                    seen = float(moved[first:end].norm() / states[first:end].norm())
            total = targets = away = 0
            for row, start in zip(rows, ends, strict=False):
                ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
                count = int((labels[:, 1:] != tokenize.IGNORED).sum())
                own = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()
                away = max(away, float((states[start : start + len(own)] - own).norm() / own.norm()))
                if count:
                    total, targets = total + model(input_ids=ids, labels=labels).loss.item() * count, targets + count
    except Exception as error:  # whatever the model's code raises for arguments that it does not know
        log.debug("padding-free rows", exc_info=True)
        return f"its forward pass does not take them ({type(error).__name__})"
    finally:
        model.train(training)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of these sizes are of no use to the training
    alone = total / max(targets, 1)
    if not abs(whole - alone) <= TOLERANCE[dtype.itemsize] * max(1.0, abs(alone)):
        return f"the loss of the first rows would be {whole:.5f}, not {alone:.5f}"
    if not away <= HIDDEN[dtype.itemsize]:
        return f"a row would not be what it is alone: its hidden states differ by {100 * away:.2f} %"
    if not seen <= (SEEN if _computes_tokens_alike(base) else HIDDEN[dtype.itemsize]):
        return f"a row would see another one: with other tokens there its hidden states move by {100 * seen:.2g} %"
    return ""


def _computes_tokens_alike(base: Any) -> bool:
    """Whether the tokens of a micro-batch are multiplied in the same way whatever the others are."""
    mixture = any(name.endswith("experts") for name, _ in base.named_modules())
    return not mixture and not getattr(base, "is_loaded_in_8bit", False)
