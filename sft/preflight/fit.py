"""Whether a run fits: the micro-batch that is decided for, and its estimated memory beside what there is."""

from dataclasses import asdict, replace

from sft.config.batching import effective_batch_size, is_auto
from sft.config.hardware import gpu_count
from sft.config.schema import Settings
from sft.errors import Problem
from sft.plan import memory
from sft.plan.machine import Machine
from sft.plan.plan import CLOSE, load_plan_of
from sft.preflight.findings import Found

OFF = 1.15
"""By how much what is kept of a forward pass may be less than estimated (the weights' own size is exact)."""

PROCESS_GIB = 1.0
"""What Python and the libraries take on the CPU."""


def check_gpu(found: Found, settings: Settings, machine: Machine) -> None:
    """Whether the GPU has the products that `model.load_in_fp8` asks for."""
    if settings.model.load_in_fp8 and machine.gpu and not machine.fp8:
        why = f"{machine.name} multiplies no FP8 numbers: that begins with compute capability 8.9 (L4, RTX 4090, H100)."
        found.refuse("Model", [Problem("model.load_in_fp8=true", why, "model.load_in_fp8=false")])


def check_memory(found: Found, settings: Settings, machine: Machine, dims: memory.ModelDims | None, whole: bool) -> None:
    """Show the batch plan, and compare its estimated peak with the memory there is."""
    name, capacity, batch = machine.name, machine.free_gib, found.plan.batch
    load = load_plan_of(settings, found.plan, machine)
    longest = memory.longest_rows(found.lengths.get("train", []), settings)
    checkpointing = "with" if load.checkpointing else "without"
    rows, micro_batches, processes = batch.per_device_train_batch_size, batch.gradient_accumulation_steps, found.plan.processes
    text = f"{rows} rows x {micro_batches} micro-batches a step, {checkpointing} gradient checkpointing"
    text += f" of one in {load.every_n_layers} layers" if load.checkpointing and load.every_n_layers > 1 else ""
    text += f", on {processes} processes" if processes > 1 else ""
    if is_auto(settings.trainer) and (whole or capacity is not None):
        began = found.plan.reasons["batch"] == "as the run began"
        found.ok("Memory", f"auto: {text}" + (", as the run began" if began else ""))
    if capacity and processes == 1 and not settings.preflight.gpu and (count := gpu_count()) > 1:
        found.ok("Memory", f"one of the {count} GPUs that are here; distributed=ddp trains on all of them")
    found.facts["batch"] = {**asdict(batch), "effective_batch_size": batch.effective_batch_size}
    if dims is None or not whole:
        return
    guess = memory.estimate(dims, load, *memory.largest(load, rows, longest))
    needed = guess.needed if capacity else (guess.allocated + PROCESS_GIB) * processes  # which share this machine's memory
    found.facts["memory"] = {
        **{k: round(v, 3) for k, v in asdict(guess).items()},
        "allocated_gib": round(guess.allocated, 3), "reserved_gib": round(guess.reserved, 3), "needed_gib": round(needed, 3),
        "device": name, "capacity_gib": capacity, "rows": rows, "tokens": memory.tokens_at_once(load, rows, longest),
    }  # fmt: skip
    parts = f"weights {guess.weights:.1f}, trained {guess.trained:.1f}, activations {guess.activations:.1f}"
    parts += f", keys and values of rollouts {guess.rollouts:.1f}" if guess.rollouts else ""
    text = f"about {needed:.1f} GiB at the longest rows ({parts}): {text}"
    limit = capacity or _free_memory()
    text += f"; {name} has {limit:.1f}" + ("" if capacity else " free")
    if needed <= CLOSE * limit:
        found.ok("Memory", text)
        return
    fix = "trainer.per_device_train_batch_size=1   or a smaller model"
    fix = _fix_memory(settings, load, dims, longest, limit) if capacity else fix
    least = memory.estimate(dims, replace(load, checkpointing=True), 1, longest[0])
    if capacity and least.weights + least.trained + least.activations / OFF > limit:
        what = f"model.name={settings.model.name} on {name}"
        why = f"Even one row at a time takes about {least.needed:.1f} GiB, and {name} has {limit:.1f}."
        found.refuse("Memory", [Problem(what, why, fix)])
    else:
        found.warn("Memory", f"Memory may be short: {text}.", fix)


def _fix_memory(settings: Settings, load: memory.LoadPlan, dims: memory.ModelDims, longest: list[int], limit: float) -> str:
    """The first of the usual ways that fits by the estimate."""
    plain = "trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps=null "
    plain += f"trainer.effective_batch_size={effective_batch_size(settings.trainer)}"
    ways = [(plain, load), (f"{plain} trainer.gradient_checkpointing=true", replace(load, checkpointing=True))]
    if not load.full and load.bits > 4:
        packed = replace(load, checkpointing=True, bits=4)
        ways.append(("model.load_in_4bit=true   for a quarter of the weights' memory", packed))
    for text, way in ways:
        if memory.estimate(dims, way, 1, longest[0]).needed <= CLOSE * limit:
            return text
    return "a smaller model, or shorter rows: model.max_seq_length=... dataset.overlong=drop"


# ------------------------------------------------------------------------------------------------------- small parts


def _free_memory() -> float:
    import psutil

    return psutil.virtual_memory().available / 2**30


def shown_size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
