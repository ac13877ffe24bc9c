"""What is known before a weight is loaded: every part of a run looked at, all problems at once, preflight.json.

Each line is ok, a warning or a refusal. A run says the gist and the warnings; `preflight.mode=only` shows everything, trains
nothing and leaves nothing behind.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft import looks, lora, memory, models, origins, shared, speeds, versions
from sft.batch import (
    CPU_ROWS,
    Split,
    candidates,
    effective_batch_size,
    is_auto,
    planned_steps,
    split_of,
    why_padded,
)
from sft.data import Prepared, token_counts
from sft.errors import Problem, Refusal, first_line
from sft.export import exporter, gguf, hub
from sft.keys import shown
from sft.runtime import write_json
from sft.settings import PreflightMode, Settings, Tracker, TrackingMode
from sft.tracking import choose_mode, has_api_key, place
from sft.validate import gpu_count, processes_of, warnings_for

log = logging.getLogger(__name__)

OK, WARNING, REFUSED = "ok", "warning", "refused"
CLOSE, OFF = 0.9, 1.15
"""An estimate above this share of the GPU's memory is close to it; by how much what is kept of a forward pass may be less than
estimated (the weights' own size is exact)."""
PROCESS_GIB = 1.0
"""What Python and the libraries take on the CPU."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    part: str
    state: str
    """`ok`, `warning` or `refused`."""
    text: str
    fix: str = ""
    """The override or command that mends it."""


@dataclass
class Found:
    """What a look at a run gives."""

    tokenizer: Any = None
    stop_ids: set[int] = field(default_factory=set)
    prepared: Prepared | None = None
    split: Split | None = None
    lines: list[Line] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What goes to preflight.json besides the data's facts."""

    def ok(self, part: str, text: str) -> None:
        """Add a line that needs nothing."""
        self.lines.append(Line(part, OK, text))

    def warn(self, part: str, text: str, fix: str = "") -> None:
        """Add a warning."""
        self.lines.append(Line(part, WARNING, text, fix))

    def refuse(self, part: str, problems: list[Problem]) -> None:
        """Add problems that keep the run from starting."""
        self.problems += problems
        self.lines += [Line(part, REFUSED, f"{p.what}\n{p.why}", p.fix) for p in problems]

    @contextlib.contextmanager
    def collecting(self, part: str) -> Iterator[None]:
        """Note a Refusal in the block and go on after it."""
        try:
            yield
        except Refusal as refusal:
            self.refuse(part, refusal.problems)

    @property
    def warnings(self) -> list[str]:
        """The warnings as sentences with their fix."""
        joined = ((line.text, " or: ".join(line.fix.splitlines())) for line in self.lines if line.state == WARNING)
        return [f"{text} ({fix})" if fix else text for text, fix in joined]


def examine(settings: Settings, folder: Path, backend: str, sources: dict[str, str], split: Split | None = None) -> Found:
    """Look at everything that can keep this run from its end; prepares the data on the way.

    `sources` are the origins of the settings, `split` what an earlier session of the same run had decided. With
    `preflight.mode=skip` only the data is looked at. Problems are collected, not raised.
    """
    found, whole = Found(split=split), settings.preflight.mode != PreflightMode.skip
    check_settings(found, settings, sources)
    if whole:
        check_versions(found)
    with found.collecting("Data"):
        found.tokenizer, found.stop_ids = shared.load_tokenizer(settings)
        found.prepared = shared.prepare_data(settings, found.tokenizer, found.stop_ids)
        check_data(found, settings)
        check_ids(found, settings)
    shape = read_shape(found, settings) if whole or _device(settings)[1] is not None else None
    check_memory(found, settings, backend, shape, whole)
    if whole:
        check_length(found, settings, backend, shape)
        check_disk(found, settings, folder, shape)
        check_tracking(found, settings)
        check_export(found, settings)
    return found


# ------------------------------------------------------------------------------------------------------ the parts


def check_settings(found: Found, settings: Settings, sources: dict[str, str]) -> None:
    """Each value and where it comes from; what is ignored or unlikely to be meant."""
    described = origins.describe(settings, sources)
    found.facts["settings"] = described
    chosen = {key: entry for key, entry in described.items() if entry["origin"] != origins.DEFAULT}
    for key, entry in chosen.items():
        found.ok("Settings", f"{key}={shown(entry['value'])}   {entry['origin']}")
    found.ok("Settings", f"the other {len(described) - len(chosen)} have their defaults: docs/settings.md")
    source = sources.get("model.trust_remote_code", origins.DEFAULT)
    if settings.model.trust_remote_code and source not in (origins.TYPED, "run.json"):  # the latter was asked for anew
        found.warn("Settings", f"model.trust_remote_code=true comes from {source}: the model's own code runs with your rights.")
    for warning in warnings_for(settings):
        found.warn("Settings", warning)


def check_versions(found: Found) -> None:
    """Installed packages against the tested set."""
    count, other = versions.differing()
    if other:
        text = f"Other versions than the tested ones: {', '.join(other)}."
        found.warn("Versions", text, "pip install -e .   brings those back")
    else:
        found.ok("Versions", f"{count} packages, each in the version that is tested")


def check_data(found: Found, settings: Settings) -> None:
    """What the rows are, and what the data's own counts warn of."""
    facts = found.prepared.facts
    rows, lengths, part = facts["rows"], facts["lengths"]["train"], "Data"
    held_out = f"{rows['eval']} held out" if rows.get("eval") else "none held out"
    found.ok(part, f"{facts['source']}: {rows['train']} rows to train on, {held_out}, of {rows['read']} read")
    ends = " or ".join(facts["stop_tokens"])
    found.ok(part, f"shape {facts['shape']}, template {facts['template']}, an answer ends with {ends}")
    text = f"tokens a row: median {lengths['p50']}, 90% under {lengths['p90']}, longest {lengths['max']} of "
    text += f"model.max_seq_length={settings.model.max_seq_length}; "
    found.ok(part, text + f"{facts['trained_tokens']:,} of {facts['train_tokens']:,} are learnt")
    bos = f"BOS {facts['bos_token']} before each row" if facts["adds_bos"] else "no BOS is added"
    found.ok(part, f"{bos}, padding {facts['pad_token']}; no row lacks its end mark" if not facts["rows_without_eos"] else bos)
    if facts["pad_token"] == facts["eos_token"]:
        found.warn(part, "Padding and end mark are the same token: the end may not be learnt by code that masks padding.")
    if not facts["duplicates"]["held_out"] and rows.get("eval"):
        found.ok(part, "no held-out row is trained on as well")
    if facts["duplicates"]["train"]:
        found.ok(part, f"{facts['duplicates']['train']} rows to train on are copies of others")
    for warning in facts["warnings"]:
        found.warn(part, warning)


def check_ids(found: Found, settings: Settings) -> None:
    """Token ids against the rows of the embeddings, which config.json gives: one beyond ends a run with an IndexError."""
    import pyarrow.compute as pc

    rows, tokenizer = models.vocabulary_of(settings.model), found.tokenizer
    if rows is None:
        return
    config = f"config.json has vocab_size={rows}"
    fix = "leave the token out of the data and the chat template, or take a model whose embeddings have its row"
    for split in filter(None, (found.prepared.train, found.prepared.eval)):
        highest = pc.max(pc.list_flatten(split.data.column("input_ids"))).as_py()
        if highest >= rows:
            row = next(r for r in split if max(r["input_ids"]) == highest)["row"]
            what = f"row {row} of the data: the token {tokenizer.convert_ids_to_tokens(highest)!r}, id {highest}"
            found.refuse("Data", [Problem(what, f"The model's embeddings have no row for it: {config}.", fix)])
            return
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= rows)
    if beyond:
        named = ", ".join(tokenizer.convert_ids_to_tokens(beyond[:3]))
        found.warn("Data", f"The tokenizer has {len(beyond)} tokens that the model has no embedding for ({named}): {config}.")


def read_shape(found: Found, settings: Settings) -> memory.Shape | None:
    """The model's shape by its config, with what is wrong with the modules that `lora` names; None, with a warning, where it
    cannot be told."""
    where = models.locate(settings.model, weights=False)[0]
    try:
        model, config = memory.empty_model(settings, where)
        check_adapter(found, settings, model)
        shape = memory.shape_of(model, config, settings)
        why = "it is a mixture of experts, whose memory is not estimated"
    except Exception as error:  # not reachable, unknown to this transformers, code of its own: the load will say so itself
        shape, why = None, first_line(error).replace(str(where), settings.model.name).rstrip(".")
        if models.asks_for_code(error):
            problem = models.code_problem(settings.model)
            found.refuse("Model", [problem] if problem not in found.problems else [])  # the tokenizer may have said so
            return None
    if shape is None:
        found.warn("Memory", f"The size of {settings.model.name} is not known beforehand: {why}.")
    return shape


def check_adapter(found: Found, settings: Settings, model: Any) -> None:
    """Whether the model has the modules that `lora` names, and PEFT an adapter for each; `model` needs no weights."""
    if settings.lora.enabled:
        problems, warnings = lora.check_modules(model, settings.lora)
        found.refuse("Model", problems)
        for warning in warnings:
            found.warn("Model", warning)


def check_memory(found: Found, settings: Settings, backend: str, shape: memory.Shape | None, whole: bool) -> None:
    """Decide the split of a step into passes, and hold its estimated peak against the memory there is."""
    name, capacity = _device(settings)
    load = _load_of(found, settings, backend, shape, capacity)
    longest = _longest(found.prepared, settings)
    auto, reused = is_auto(settings.trainer), found.split is not None
    if found.split is None:
        found.split = _decide(settings, load, shape, longest, capacity)
    split = found.split
    load = _as_split(load, split)
    checkpointing = "with" if load.checkpointing else "without"
    rows, passes = split.per_device_train_batch_size, split.gradient_accumulation_steps
    processes = processes_of(settings)
    text = f"{rows} rows x {passes} passes a step, {checkpointing} gradient checkpointing"
    text += f" of one in {load.every_n_layers} layers" if load.checkpointing and load.every_n_layers > 1 else ""
    text += f", on {processes} processes" if processes > 1 else ""
    if auto and (whole or capacity is not None):
        found.ok("Memory", f"auto: {text}" + (", as the run began" if reused else ""))
    if capacity and processes == 1 and not settings.preflight.gpu and (count := gpu_count()) > 1:
        found.ok("Memory", f"one of the {count} GPUs that are here; distributed=ddp trains on all of them")
    found.facts["batch"] = {**asdict(split), "effective_batch_size": split.effective_batch_size}
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


def _load_of(found: Found, settings: Settings, backend: str, shape: memory.Shape | None, capacity: float | None) -> memory.Load:
    """How the model is loaded and trained, rows end to end where that can be expected."""
    flat = capacity is not None and shape is not None and not why_padded(settings, backend) and models.has_kernel(settings)
    rows, tokens = (found.prepared.facts["rows"]["train"], found.prepared.facts["train_tokens"]) if found.prepared else (1, 0)
    steps = planned_steps(settings.trainer, rows)
    tokens *= steps * effective_batch_size(settings.trainer) / rows
    return memory.load_of(settings, backend, capacity is not None, flat, tokens)


def _as_split(load: memory.Load, split: Split) -> memory.Load:
    """The same with the checkpointing that was decided for."""
    if split.gradient_checkpointing is None:
        return load
    # One layer of several also where trainer.extra says so, and nothing was decided.
    every = split.every_n_layers if split.every_n_layers > 1 else load.every_n_layers
    return replace(load, checkpointing=split.gradient_checkpointing, every_n_layers=every)


def _decide(settings, load, shape, longest: list[int], capacity: float | None) -> Split:
    """The split: as set, or for `auto` the most rows that fit; with rows end to end, checkpointing only if it is needed."""
    trainer = settings.trainer
    choices = candidates(trainer, processes_of(settings)) if is_auto(trainer) else [trainer.per_device_train_batch_size]
    if shape is None or capacity is None:
        rows = next((n for n in choices if n <= CPU_ROWS), choices[-1]) if is_auto(trainer) else None
        return split_of(trainer, rows, trainer.gradient_checkpointing)
    if not is_auto(trainer) and not load.flat:
        return split_of(trainer, checkpointing=trainer.gradient_checkpointing)
    return memory.fitting_split(shape, settings, load, longest, CLOSE * capacity, choices)[0]


def _fix_memory(settings: Settings, load: memory.Load, shape: memory.Shape, longest: list[int], limit: float) -> str:
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


def check_length(found: Found, settings: Settings, backend: str, shape: memory.Shape | None) -> None:
    """Steps, epochs and tokens of the run; roughly the time they take, where the speed of such a run was measured."""
    if found.prepared is None:
        return
    facts, trainer, split = found.prepared.facts, settings.trainer, found.split
    each = -(-facts["rows"]["train"] // split.effective_batch_size)
    steps = planned_steps(trainer, facts["rows"]["train"])
    epochs = steps / each
    tokens = int(facts["train_tokens"] * epochs)
    found.facts["plan"] = {"steps": steps, "epochs": round(epochs, 3), "tokens": tokens}
    found.ok("Length", f"{steps} steps of {split.effective_batch_size} rows: {epochs:.2f} epochs, {tokens:,} tokens")
    _plan_looks(found, settings, steps)
    name, capacity = _device(settings)
    device = settings.preflight.gpu.value if settings.preflight.gpu else speeds.device_of(name) if capacity else "cpu"
    load = _load_of(found, settings, backend, shape, capacity)
    load = _as_split(load, split)
    rows = split.per_device_train_batch_size
    speed = speeds.measured_speed(device, shape.parameters, load, rows) if shape else None
    if speed is None:
        found.ok("Length", f"no speed was measured for such a model on {name}: the run tells after its first ten steps")
        return
    seconds = tokens / speed
    found.facts["plan"]["seconds"] = round(seconds)
    text = f"roughly {speeds.duration(seconds)} of training at {speed:,.0f} tokens a second, "
    text += f"measured with {speeds.SOURCE[device]}; the run tells more exactly after its first ten steps"
    if trainer.max_hours and seconds > 3600 * trainer.max_hours:
        fix = "trainer.max_steps=...   for a shorter run; else it stops there and the same command goes on"
        found.warn("Length", f"{text}; trainer.max_hours={trainer.max_hours:g} is less.", fix)
    else:
        found.ok("Length", text)


def _plan_looks(found: Found, settings: Settings, steps: int) -> None:
    """At which steps the held-out loss is measured and prompts are answered, and why not in between."""
    facts = found.prepared.facts
    planned = looks.with_looks(settings, facts)
    every = looks.steps_between(planned.samples.every_steps, steps)
    found.facts["plan"]["answers_every"] = every
    if found.prepared.eval is None:
        return
    every = looks.steps_between(planned.trainer.eval_steps, steps)
    found.facts["plan"]["evaluated_every"] = every
    text = "held-out loss before the first step and after the last"
    if every < steps:
        text += f", and every {every} steps"
    elif settings.trainer.eval_steps is None:
        share = looks.evaluation_work(settings.trainer, steps, facts)
        text += f"; at every quarter it would be {100 * share:.0f} % of the training's work (trainer.eval_steps=0.25)"
    found.ok("Length", text)


def check_disk(found: Found, settings: Settings, folder: Path, shape: memory.Shape | None) -> None:
    """What checkpoints, the kept weights and each export take, against what is free."""
    if shape is None:
        return
    trainer, adapter = settings.trainer, settings.lora.enabled
    state = memory.OPTIMIZER_BYTES.get(trainer.optim, 8)
    kept = shape.trained * 4
    sizes = {
        f"{trainer.save_total_limit} checkpoints and one being written": (trainer.save_total_limit + 1)
        * (kept + shape.trained * state),
        "adapter" if adapter else "model": kept,
        **{name: size * shape.parameters for name, size in exporter.bytes_a_parameter(settings.export).items()},
    }
    need, place = sum(sizes.values()), next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    found.facts["disk"] = {"needed_gib": round(need / 2**30, 3), "free_gib": round(free / 2**30, 1)}
    text = f"about {_size(need)}: " + ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    fix = "hydra.run.dir=<a folder on another disk>\ntrainer.save_total_limit=1"
    if settings.export.formats:
        fix += "\nexport=none   and later: python scripts/export.py run=<run folder> export=..."
    if need > free:
        why = f"The run writes {text}; {_size(free)} are free there."
        found.refuse("Disk", [Problem(f"the disk of {os.path.relpath(place)}", why, fix)])
    elif need > 0.9 * free:
        found.warn("Disk", f"{text}; only {_size(free)} are free.", fix)
    else:
        found.ok("Disk", f"{text}; {_size(free)} free")


def check_tracking(found: Found, settings: Settings) -> None:
    """Whether W&B will be reached."""
    tracking = settings.tracking
    if tracking.tracker == Tracker.none:
        found.ok("Tracking", "the run folder alone")
        return
    with found.collecting("Tracking"):
        mode, why = choose_mode(tracking.mode)
        entity, project = place(tracking)
        project = f"project {entity}/{project}" if entity else f"project {project}"
        if mode == "online":
            found.ok("Tracking", f"W&B online, {project}")
        elif mode == "disabled":
            found.ok("Tracking", f"the run folder alone: W&B is switched off ({why})")
        elif tracking.mode == TrackingMode.online:
            why = f"W&B cannot be online: {why}."
            fix = "wandb login   or   tracking.mode=offline" if not has_api_key() else "tracking.mode=offline"
            found.refuse("Tracking", [Problem("tracking.mode=online", why, fix)])
        else:
            found.ok("Tracking", f"W&B offline ({why}), {project}; the run says how to upload it")


def check_export(found: Found, settings: Settings) -> None:
    """llama.cpp's parts, and the hub: login, name, permission to write. Repositories are made when nothing else is wrong."""
    wanted = settings.export
    if not wanted.formats:
        found.ok("Export", "nothing but the adapter" if settings.lora.enabled else "nothing but the model")
        return
    if "gguf" in wanted.formats:
        missing = gguf.missing_parts()
        found.refuse("Export", missing)
        if not missing:
            found.ok("Export", "llama.cpp's converter and quantiser are installed")
    if wanted.hub.repo is None:
        found.ok("Export", f"{', '.join(wanted.formats)}, on this disk alone")
        return
    create = settings.preflight.mode == PreflightMode.run and not found.problems
    problems = hub.check_access(wanted.hub.repo, wanted.formats, wanted.hub.private, create)
    found.refuse("Export", problems)
    if not problems:
        names = ", ".join(dict.fromkeys(hub.repo_for(wanted.hub.repo, f) for f in wanted.formats))
        found.ok("Export", f"the hub takes {names} ({'private' if wanted.hub.private else 'public'})")


# -------------------------------------------------------------------------------------------------- record and view


def write_preflight(folder: Path, found: Found) -> dict[str, Any]:
    """Write preflight.json, log its gist and the warnings, and return it."""
    content = {**found.prepared.facts, **found.facts}
    content |= {"warnings": found.warnings, "checks": [asdict(line) for line in found.lines]}
    write_json(folder / "preflight.json", content)
    rows, lengths = content["rows"], content["lengths"]["train"]
    held_out = f", {rows['eval']} held out" if rows.get("eval") else ", none held out"
    log.info("Data   %s: %d rows to train on%s", content["source"], rows["train"], held_out)
    log.info(
        "       shape %s, template %s, an answer ends with %s",
        content["shape"],
        content["template"],
        " or ".join(content["stop_tokens"]),
    )
    log.info("       tokens a row: median %d, 90%% under %d, longest %d", lengths["p50"], lengths["p90"], lengths["max"])
    plan, needed = content.get("plan"), content.get("memory", {}).get("needed_gib")
    if plan:
        memory_text = f", about {needed:.1f} GiB of memory" if needed else ""
        log.info("Plan   %d steps, %.2f epochs, %s tokens%s", plan["steps"], plan["epochs"], f"{plan['tokens']:,}", memory_text)
    for warning in content["warnings"]:
        log.warning(warning)
    return content


def show(found: Found) -> None:
    """Print everything that was found: the first rows, then each part's lines."""
    from sft.show import show_examples, show_lines, terminal

    console = terminal()
    if found.prepared is not None:
        show_examples(console, found.prepared.facts, found.tokenizer)
    show_lines(console, found.lines)
    counts = [sum(line.state == state for line in found.lines) for state in (OK, WARNING, REFUSED)]
    console.print(f"\n{counts[0]} ok, {counts[1]} warnings, {counts[2]} refused; nothing was trained.")


# ------------------------------------------------------------------------------------------------------- small parts


def _device(settings: Settings) -> tuple[str, float | None]:
    """(name, GiB) of the GPU that is trained on; ("this machine", None) without one."""
    if settings.preflight.gpu:
        return settings.preflight.gpu.value, memory.within_limit(settings, memory.CAPACITY[settings.preflight.gpu])
    import torch

    if not torch.cuda.is_available():
        return "this machine", None
    # What other processes hold is not there for us; what an earlier job of ours holds is.
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return torch.cuda.get_device_name(), round(memory.within_limit(settings, free / 2**30 + memory.CONTEXT), 2)


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


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
