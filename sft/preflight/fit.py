"""Whether a run fits: the micro-batch that is decided for, and its estimated memory beside what there is."""

from dataclasses import asdict, replace

from sft.config import hardware
from sft.config.batching import CPU_ROWS, BatchPlan, batch_plan_of, candidates, effective_batch_size, is_auto, planned_steps
from sft.config.eligibility import why_padded
from sft.config.hardware import gpu_count, processes_of
from sft.config.schema import Settings
from sft.data.token_cache import Prepared, token_counts
from sft.errors import Problem
from sft.model.backend import has_kernel
from sft.plan import memory
from sft.preflight.findings import Found

CLOSE, OFF = 0.9, 1.15
"""An estimate above this share of the GPU's memory is close to it; by how much what is kept of a forward pass may be less than
estimated (the weights' own size is exact)."""

PROCESS_GIB = 1.0
"""What Python and the libraries take on the CPU."""


def check_memory(found: Found, settings: Settings, backend: str, shape: memory.ModelDims | None, whole: bool) -> None:
    """Decide the batch plan, and compare its estimated peak with the memory there is."""
    name, capacity = device_of_run(settings)
    load = expected_load(found, settings, backend, shape, capacity)
    longest = _longest(found.prepared, settings)
    auto, reused = is_auto(settings.trainer), found.split is not None
    if found.split is None:
        found.split = _decide(settings, load, shape, longest, capacity)
    plan = found.split
    load = as_planned(load, plan)
    checkpointing = "with" if load.checkpointing else "without"
    rows, micro_batches = plan.per_device_train_batch_size, plan.gradient_accumulation_steps
    processes = processes_of(settings)
    text = f"{rows} rows x {micro_batches} micro-batches a step, {checkpointing} gradient checkpointing"
    text += f" of one in {load.every_n_layers} layers" if load.checkpointing and load.every_n_layers > 1 else ""
    text += f", on {processes} processes" if processes > 1 else ""
    if auto and (whole or capacity is not None):
        found.ok("Memory", f"auto: {text}" + (", as the run began" if reused else ""))
    if capacity and processes == 1 and not settings.preflight.gpu and (count := gpu_count()) > 1:
        found.ok("Memory", f"one of the {count} GPUs that are here; distributed=ddp trains on all of them")
    found.facts["batch"] = {**asdict(plan), "effective_batch_size": plan.effective_batch_size}
    if shape is None or not whole:
        return
    guess = memory.estimate(shape, load, 1, memory.tokens_at_once(load, rows, longest))
    needed = guess.needed if capacity else (guess.allocated + PROCESS_GIB) * processes  # which share this machine's memory
    found.facts["memory"] = {
        **{k: round(v, 3) for k, v in asdict(guess).items()},
        "allocated_gib": round(guess.allocated, 3), "reserved_gib": round(guess.reserved, 3), "needed_gib": round(needed, 3),
        "device": name, "capacity_gib": capacity, "rows": rows, "tokens": memory.tokens_at_once(load, rows, longest),
    }  # fmt: skip
    parts = f"weights {guess.weights:.1f}, trained {guess.trained:.1f}, activations {guess.activations:.1f}"
    text = f"about {needed:.1f} GiB at the longest rows ({parts}): {text}"
    limit = capacity or _free_memory()
    text += f"; {name} has {limit:.1f}" + ("" if capacity else " free")
    if needed <= CLOSE * limit:
        found.ok("Memory", text)
        return
    fix = "trainer.per_device_train_batch_size=1   or a smaller model"
    fix = _fix_memory(settings, load, shape, longest, limit) if capacity else fix
    least = memory.estimate(shape, replace(load, checkpointing=True), 1, longest[0])
    if capacity and least.weights + least.trained + least.activations / OFF > limit:
        what = f"model.name={settings.model.name} on {name}"
        why = f"Even one row at a time takes about {least.needed:.1f} GiB, and {name} has {limit:.1f}."
        found.refuse("Memory", [Problem(what, why, fix)])
    else:
        found.warn("Memory", f"Memory may be short: {text}.", fix)


def expected_load(
    found: Found, settings: Settings, backend: str, shape: memory.ModelDims | None, capacity: float | None
) -> memory.LoadPlan:
    """How the model is loaded and trained, padding-free where that can be expected."""
    padding_free = capacity is not None and shape is not None and not why_padded(settings, backend) and has_kernel(settings)
    rows, tokens = (found.prepared.facts["rows"]["train"], found.prepared.facts["train_tokens"]) if found.prepared else (1, 0)
    steps = planned_steps(settings.trainer, rows)
    tokens *= steps * effective_batch_size(settings.trainer) / rows
    return memory.load_plan_of(settings, backend, capacity is not None, padding_free, tokens)


def as_planned(load: memory.LoadPlan, plan: BatchPlan) -> memory.LoadPlan:
    """The same with the checkpointing that was decided for."""
    if plan.gradient_checkpointing is None:
        return load
    # One layer of several also where trainer.extra says so, and nothing was decided.
    every = plan.every_n_layers if plan.every_n_layers > 1 else load.every_n_layers
    return replace(load, checkpointing=plan.gradient_checkpointing, every_n_layers=every)


def _decide(settings, load, shape, longest: list[int], capacity: float | None) -> BatchPlan:
    """The batch plan: as set, or for `auto` the most rows that fit; padding-free, checkpointing only if it is needed."""
    trainer = settings.trainer
    choices = candidates(trainer, processes_of(settings)) if is_auto(trainer) else [trainer.per_device_train_batch_size]
    if shape is None or capacity is None:
        rows = next((n for n in choices if n <= CPU_ROWS), choices[-1]) if is_auto(trainer) else None
        return batch_plan_of(trainer, rows, trainer.gradient_checkpointing)
    if not is_auto(trainer) and not load.flat:
        return batch_plan_of(trainer, checkpointing=trainer.gradient_checkpointing)
    return memory.fitting_batch_plan(shape, settings, load, longest, CLOSE * capacity, choices)[0]


def _fix_memory(settings: Settings, load: memory.LoadPlan, shape: memory.ModelDims, longest: list[int], limit: float) -> str:
    """The first of the usual ways that fits by the estimate."""
    plain = "trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps=null "
    plain += f"trainer.effective_batch_size={effective_batch_size(settings.trainer)}"
    ways = [(plain, load), (f"{plain} trainer.gradient_checkpointing=true", replace(load, checkpointing=True))]
    if not load.full and load.bits > 4:
        packed = replace(load, checkpointing=True, bits=4)
        ways.append(("model.load_in_4bit=true   for a quarter of the weights' memory", packed))
    for text, way in ways:
        if memory.estimate(shape, way, 1, longest[0]).needed <= CLOSE * limit:
            return text
    return "a smaller model, or shorter rows: model.max_seq_length=... dataset.overlong=drop"


# ------------------------------------------------------------------------------------------------------- small parts


def device_of_run(settings: Settings) -> tuple[str, float | None]:
    """(name, GiB) of the GPU that is trained on; ("this machine", None) without one."""
    if settings.preflight.gpu:
        return settings.preflight.gpu.value, hardware.within_limit(settings, hardware.CAPACITY[settings.preflight.gpu])
    import torch

    if not torch.cuda.is_available():
        return "this machine", None
    # What other processes hold is not there for us; what an earlier job of ours holds is.
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return torch.cuda.get_device_name(), round(hardware.within_limit(settings, free / 2**30 + hardware.CONTEXT), 2)


def _free_memory() -> float:
    import psutil

    return psutil.virtual_memory().available / 2**30


def _longest(prepared: Prepared | None, settings: Settings) -> list[int]:
    """Tokens of the longest rows, longest first, as many as a step has."""
    count = effective_batch_size(settings.trainer)
    if prepared is None:
        return [settings.model.max_seq_length] * count
    longest = sorted(token_counts(prepared.train).tolist(), reverse=True)[:count]
    return longest + longest[:1] * (count - len(longest))


def shown_size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
