"""What is known before a weight is loaded: every part of a run checked, all problems at once, preflight.json.

Each line is ok, a warning or a refusal. A run says the gist and the warnings; `preflight.mode=only` shows everything, trains
nothing and leaves nothing behind.
"""

import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import console
from sft.config import provenance, schedule
from sft.config.batching import BatchPlan
from sft.config.eligibility import check_padded
from sft.config.keys import shown
from sft.config.rules import warnings_for
from sft.config.schema import MethodName, PreflightMode, Settings
from sft.data.audit import unused_columns
from sft.data.token_cache import token_counts, trained_lengths
from sft.errors import Problem, first_line
from sft.export import gguf, requirements
from sft.export.hub import check_access, repo_for
from sft.model import adapters, hub, start, warm_cache
from sft.model import dims as model_dims
from sft.plan import memory
from sft.plan.machine import Machine, look
from sft.plan.plan import Plan, load_plan_of, plan_training
from sft.preflight import versions
from sft.preflight.findings import Found
from sft.preflight.fit import check_gpu, check_memory, shown_size
from sft.preflight.optimizer import check_optimizer
from sft.preflight.rewards import check_rewards
from sft.preflight.speed import SOURCE, device_of, measured_speed
from sft.storage.jsonio import write_json
from sft.tracking import base as trackers

log = logging.getLogger(__name__)


def examine(
    settings: Settings,
    folder: Path,
    plan: Plan,
    sources: dict[str, str],
    machine: Machine | None = None,
    began: BatchPlan | None = None,
) -> Found:
    """Check everything that can keep this run from its end; prepares the data on the way and finishes the plan.

    `plan` is that of the model, `sources` say where each setting comes from, `began` is the batch plan of an earlier session of
    the same run. With `preflight.mode=skip` only the data is checked. Problems are collected, not raised.
    """
    machine = machine or look(settings)
    found, whole = Found(plan=plan), settings.preflight.mode != PreflightMode.skip
    check_settings(found, settings, sources)
    check_gpu(found, settings, machine)
    if whole:
        check_versions(found)
    with found.collecting("Data"):
        found.tokenizer, found.stop_ids = warm_cache.load_tokenizer(settings)
        found.prepared = warm_cache.prepare_data(settings, found.tokenizer, found.stop_ids)
        splits = {"train": found.prepared.train, "eval": found.prepared.eval}
        padded = not machine.varlen
        found.lengths = {
            name: trained_lengths(token_counts(rows, padded), settings.method, padded).tolist()
            for name, rows in splits.items()
            if rows is not None
        }
        check_data(found, settings)
        check_ids(found, settings)
    if found.prepared and settings.method.name == MethodName.grpo:
        with found.collecting("Rewards"):
            check_rewards(found, settings)
    dims = read_dims(found, settings) if whole or machine.gpu else None
    facts = found.prepared.facts if found.prepared else None
    found.plan = plan_training(plan, settings, machine, dims, facts, found.lengths, began=began)
    if dims and dims.why_padded and found.plan.why_padded == dims.why_padded:
        found.refuse("Plan", check_padded(settings.trainer, dims.why_padded))
    check_memory(found, settings, machine, dims, whole)
    if whole:
        check_plan(found)
        check_training(found, settings)
        check_length(found, settings, machine, dims)
        check_disk(found, settings, folder, dims)
        check_tracking(found, settings)
        check_export(found, settings)
    return found


# ------------------------------------------------------------------------------------------------------ the parts


def check_settings(found: Found, settings: Settings, sources: dict[str, str]) -> None:
    """Each value and where it comes from; what is ignored or unlikely to be meant."""
    described = provenance.describe(settings, sources)
    found.facts["settings"] = described
    chosen = {key: entry for key, entry in described.items() if entry["origin"] != provenance.DEFAULT}
    for key, entry in chosen.items():
        found.ok("Settings", f"{key}={shown(entry['value'])}   {entry['origin']}")
    found.ok("Settings", f"the other {len(described) - len(chosen)} have their defaults: docs/settings.md")
    source = sources.get("model.trust_remote_code", provenance.DEFAULT)
    if settings.model.trust_remote_code and source not in (provenance.TYPED, "run.json"):  # the latter was requested anew
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
    held_out += f" from {facts['eval_source']}" if facts.get("eval_source") else ""
    found.ok(part, f"{facts['source']}: {rows['train']} rows to train on, {held_out}, of {rows['read']} read")
    ends = " or ".join(facts["stop_tokens"])
    found.ok(part, f"shape {facts['shape']}, template {facts['template']}, an answer ends with {ends}")
    prompts = "prompts" in facts
    text = f"tokens a {'prompt' if prompts else 'row'}: median {lengths['p50']}, 90% under {lengths['p90']}, "
    text += f"longest {lengths['max']} of model.max_seq_length={settings.model.max_seq_length}; "
    text += f"completions have up to {settings.method.max_completion_length}" if prompts else (
        f"{facts['trained_tokens']:,} of {facts['train_tokens']:,} are target tokens")  # fmt: skip
    found.ok(part, text)
    bos = f"BOS {facts['bos_token']} before each row" if facts["adds_bos"] else "no BOS is added"
    ended = not facts["rows_without_eos"] and not prompts
    found.ok(part, f"{bos}, padding {facts['pad_token']}; no row lacks its end mark" if ended else bos)
    if facts["pad_token"] == facts["eos_token"]:
        found.warn(part, "Padding and end mark are the same token: the end may not be trained on by code that masks padding.")
    if unused := unused_columns(facts["notes"]):
        found.ok(part, f"columns that are not used, with their rows: {unused}")
    if not facts["duplicates"]["held_out"] and rows.get("eval"):
        found.ok(part, "no held-out row is trained on as well")
    if facts["duplicates"]["train"]:
        found.ok(part, f"{facts['duplicates']['train']} rows to train on are copies of others")
    if settings.preflight.strict:
        fix = "mend the data   or preflight.strict=false"
        found.refuse(part, [Problem("preflight.strict=true", warning, fix) for warning in facts["warnings"]])
        return
    for warning in facts["warnings"]:
        found.warn(part, warning)


def check_ids(found: Found, settings: Settings) -> None:
    """Token ids against the rows of the embeddings, which config.json gives: one beyond ends a run with an IndexError."""
    import pyarrow.compute as pc

    rows, tokenizer = hub.vocabulary_of(settings.model), found.tokenizer
    if rows is None:
        return
    config = f"config.json has vocab_size={rows}"
    fix = "leave the token out of the data and the chat template, or take a model whose embeddings have its row"
    for split in filter(None, (found.prepared.train, found.prepared.eval)):
        highest = pc.max(pc.list_flatten(split.data.column("input_ids"))).as_py()
        if highest >= rows:
            row = next(r for r in split if max(r["input_ids"]) == highest)["row"]
            where = f"held-out row {row} of {found.prepared.facts.get('eval_source', 'the data')}"
            where = f"row {row} of the data" if split is found.prepared.train else where
            what = f"{where}: the token {tokenizer.convert_ids_to_tokens(highest)!r}, id {highest}"
            found.refuse("Data", [Problem(what, f"The model's embeddings have no row for it: {config}.", fix)])
            return
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= rows)
    if beyond:
        named = ", ".join(tokenizer.convert_ids_to_tokens(beyond[:3]))
        found.warn("Data", f"The tokenizer has {len(beyond)} tokens that the model has no embedding for ({named}): {config}.")


def read_dims(found: Found, settings: Settings) -> memory.ModelDims | None:
    """The model's shape by its config, with what is wrong with the modules that `lora` names; None, with a warning, where it
    cannot be known."""
    where = hub.locate(settings.model, weights=False)[0]
    try:
        model, config = model_dims.empty_model(settings, where)
        check_adapter(found, settings, model)
        shape = model_dims.dims_of(model, config, settings)
        why = "the memory of adapters on experts, or of this kind of a mixture, is not estimated"
    except Exception as error:  # not reachable, unknown to this transformers, code of its own: the load will report it itself
        shape, why = None, first_line(error).replace(str(where), settings.model.name).rstrip(".")
        if problems := hub.adapter_problem(settings.model, settings.lora):
            found.refuse("Model", problems)
            return None
        if hub.asks_for_code(error):
            problem = hub.code_problem(settings.model)
            found.refuse("Model", [problem] if problem not in found.problems else [])  # the tokenizer may have reported it
            return None
    if shape is None:
        found.warn("Memory", f"The size of {settings.model.name} is not known beforehand: {why}.")
    return shape


def check_adapter(found: Found, settings: Settings, model: Any) -> None:
    """Whether the model has the modules that `lora` names, and PEFT an adapter for each; `model` needs no weights."""
    if settings.lora.enabled:
        problems, warnings = adapters.check_modules(model, settings.lora)
        if not problems:
            reach, problems, further = adapters.coverage(model, settings.lora)
            found.facts["coverage"] = reach
            warnings += further
            if not problems:
                found.ok("Model", reach)
        if settings.lora.start_from and not problems:
            problems, further, found.facts["start_from"] = start.check_start(settings, model)
            warnings += further
        found.refuse("Model", problems)
        for warning in warnings:
            found.warn("Model", warning)


def check_plan(found: Found) -> None:
    """What was decided where the settings leave it open, and why."""
    plan = found.plan
    found.facts["decided"] = plan.facts()
    found.ok("Plan", f"model.backend={plan.backend}, computes in {plan.dtype}   {plan.reasons.get('backend', 'as set')}")
    if plan.target_modules:
        found.ok("Plan", f"adapters on {', '.join(plan.target_modules)}   {plan.reasons['targets']}")
    speed = [word for word, on in (("padding-free rows", plan.padding_free), ("compiled layers", plan.compiled),
                                   ("captured micro-batches", plan.captured)) if on]  # fmt: skip
    why = plan.why_padded or plan.reasons.get("padding_free", "")
    found.ok("Plan", f"{', '.join(speed) or 'padded rows'}   {why}")


def check_training(found: Found, settings: Settings) -> None:
    """The optimiser and the schedule, built once for a layer of one weight."""
    trainer, problems = settings.trainer, check_optimizer(settings, found.plan.steps or 0)
    found.refuse("Plan", problems)
    if not problems:
        found.ok("Plan", f"{trainer.optim} with a schedule {trainer.lr_scheduler_type} can be made")


def check_length(found: Found, settings: Settings, machine: Machine, dims: memory.ModelDims | None) -> None:
    """Steps, epochs and tokens of the run; roughly the time they take, where the speed of such a run was measured."""
    if found.prepared is None:
        return
    facts, trainer, batch, steps = found.prepared.facts, settings.trainer, found.plan.batch, found.plan.steps
    each = -(-facts["rows"]["train"] // batch.effective_batch_size)
    epochs = steps / each
    method, written = settings.method, 0
    if method.name == MethodName.grpo:
        written = facts["rows"]["train"] * method.num_generations * method.max_completion_length
    tokens = int((facts["train_tokens"] + written) * epochs)
    found.facts["plan"] = {"steps": steps, "epochs": round(epochs, 3), "tokens": tokens}
    rows = f"prompts x {method.num_generations} completions" if written else "rows"
    text = f"{steps} steps of {batch.effective_batch_size} {rows}: {epochs:.2f} epochs, "
    found.ok("Length", f"{text}{'at most ' * bool(written)}{tokens:,} tokens")
    _check_schedule(found, settings)
    if written:
        found.ok("Length", "no time is reckoned for completions: the run logs its speed after ten steps")
        return
    device = settings.preflight.gpu.value if settings.preflight.gpu else device_of(machine.name) if machine.gpu else "cpu"
    load = load_plan_of(settings, found.plan, machine)
    known = dims and not dims.routed  # experts that a token is not sent to cost it nothing
    speed = measured_speed(device, dims.parameters, load, batch.per_device_train_batch_size) if known else None
    if speed is None:
        found.ok("Length", f"no speed was measured for such a model on {machine.name}: the run logs one after ten steps")
        return
    seconds = tokens / speed
    found.facts["plan"]["seconds"] = round(seconds)
    text = f"roughly {console.duration(seconds)} of training steps at {speed:,.0f} tokens a second, measured with "
    text += f"{SOURCE[device]}; the start, evaluations and samples come on top; the run logs it more exactly after ten steps"
    if trainer.max_hours and seconds > 3600 * trainer.max_hours:
        fix = "trainer.max_steps=...   for a shorter run; else it stops there and the same command goes on"
        found.warn("Length", f"{text}; trainer.max_hours={trainer.max_hours:g} is less.", fix)
    else:
        found.ok("Length", text)


def _check_schedule(found: Found, settings: Settings) -> None:
    """At which steps the held-out loss is measured and prompts are completed, and why not in between."""
    plan, steps = found.plan, found.plan.steps
    found.facts["plan"]["answers_every"] = schedule.steps_between(plan.every_steps, steps)
    if found.prepared.eval is None:
        return
    every = schedule.steps_between(plan.eval_steps, steps)
    found.facts["plan"]["evaluated_every"] = every
    measured = "reward" if settings.method.name == MethodName.grpo else "loss"
    text = f"held-out {measured} before the first step and after the last"
    if every < steps:
        text += f", and every {every} steps"
    elif settings.trainer.eval_steps is None:
        share = schedule.evaluation_work(settings.trainer, steps, found.prepared.facts)
        text += f"; at every quarter it would be {100 * share:.0f} % of the training's work (trainer.eval_steps=0.25)"
    found.ok("Length", text)


def check_disk(found: Found, settings: Settings, folder: Path, dims: memory.ModelDims | None) -> None:
    """What checkpoints, the kept weights and each export take, against what is free."""
    if dims is None:
        return
    trainer, adapter = settings.trainer, settings.lora.enabled
    state = memory.OPTIMIZER_BYTES.get(trainer.optim, 8)
    kept = dims.trained * 4
    sizes = {
        f"{trainer.save_total_limit} checkpoints and one being written": (trainer.save_total_limit + 1)
        * (kept + dims.trained * state),
        "adapter" if adapter else "model": kept,
        **{name: size * dims.parameters for name, size in requirements.bytes_a_parameter(settings.export).items()},
    }
    need, place = sum(sizes.values()), next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    found.facts["disk"] = {"needed_gib": round(need / 2**30, 3), "free_gib": round(free / 2**30, 1)}
    text = f"about {shown_size(need)}: " + ", ".join(f"{name} {shown_size(size)}" for name, size in sizes.items())
    fix = "\n".join(["hydra.run.dir=<a folder on another disk>", *_ways_to_save_space(settings, [*sizes.values()], free)])
    if need > free:
        why = f"The run writes {text}; {shown_size(free)} are free there."
        found.refuse("Disk", [Problem(f"the disk of {os.path.relpath(place)}", why, fix)])
    elif need > 0.9 * free:
        found.warn("Disk", f"{text}; only {shown_size(free)} are free.", fix)
    else:
        found.ok("Disk", f"{text}; {shown_size(free)} free")


def _ways_to_save_space(settings: Settings, sizes: list[float], free: float) -> list[str]:
    """The overrides that make a run fit into what is free; `sizes` are those of its checkpoints, of the weights, of exports."""
    limit, (checkpoints, *_), exports = settings.trainer.save_total_limit, sizes, sum(sizes[2:])
    fewer, later = "trainer.save_total_limit=1", "export=none"
    explained = "   and later: python scripts/export.py run=<run folder> export=..."
    ways = {fewer: checkpoints * (limit - 1) / (limit + 1), later + explained: exports}
    ways |= {f"{fewer} {later}{explained}": sum(ways.values())} if all(ways.values()) else {}
    fitting = [way for way, less in ways.items() if less and sum(sizes) - less <= free]
    return fitting[:2]


def check_tracking(found: Found, settings: Settings) -> None:
    """Where the run will be tracked."""
    with found.collecting("Tracking"):
        found.ok("Tracking", trackers.check_tracking(settings))


def check_export(found: Found, settings: Settings) -> None:
    """llama.cpp's parts, and the hub: login, name, permission to write. Repositories are made when nothing else is wrong."""
    wanted = settings.export
    if not wanted.formats:
        found.ok("Export", "nothing but the adapter" if settings.lora.enabled else "nothing but the model")
        return
    if "gguf" in wanted.formats:
        missing = gguf.missing_parts() or gguf.check_architecture(hub.read_config(settings.model), wanted.formats)
        found.refuse("Export", missing)
        if not missing:
            found.ok("Export", "llama.cpp's converter and quantiser are installed")
    if wanted.hub.repo is None:
        found.ok("Export", f"{', '.join(wanted.formats)}, on this disk alone")
        return
    create = settings.preflight.mode == PreflightMode.run and not found.problems
    problems = check_access(wanted.hub.repo, wanted.formats, wanted.hub.private, create)
    found.refuse("Export", problems)
    if not problems:
        names = ", ".join(dict.fromkeys(repo_for(wanted.hub.repo, f) for f in wanted.formats))
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
