"""Rules between settings: everything that can be known to be wrong from the settings alone.

Imports neither torch nor transformers nor Unsloth; names that upstream knows are read from upstream's source text.
"""

import difflib
import importlib.util
import math
import os
import re
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sft.config.batching import check_batch_plan
from sft.config.data_rules import check_dataset, shortened, warn_of_paths, why_lost
from sft.config.eligibility import check_speed
from sft.config.export_rules import check_export
from sft.config.extra_rules import check_extra, check_loss
from sft.config.fp8_rules import check_fp8
from sft.config.hardware import gpu_count, gpu_present, is_process_count, one_process, processes_of, resolve_backend
from sft.config.keys import shown, typed
from sft.config.lora_rules import check_lora, model_problem
from sft.config.method_rules import check_method
from sft.config.schema import (
    BUILT_IN,
    Backend,
    Dtype,
    MethodName,
    MethodSettings,
    PreflightMode,
    Settings,
    Strategy,
)
from sft.config.tracking_rules import check_packages, check_tracking, warn_of_tracking
from sft.config.upstream import enum_values
from sft.errors import Problem
from sft.paths import expanded

# SFTConfig options by which the processes of a run would see other rows than one process does, or another mean of the loss.
ONE_PROCESS = {"accelerator_config", "auto_find_batch_size", "average_tokens_across_devices", "dataloader_drop_last",
               "ignore_data_skip", "train_sampling_strategy"}  # fmt: skip

ON_A_GPU = r"8bit|4bit|paged|bnb"  # in the names of optimisers


def check_settings(settings: Settings, hardware: bool = True) -> list[Problem]:
    """Every problem in the settings themselves; `hardware=False` leaves out what depends on this machine."""
    problems = [
        *_check_blank(settings),
        *_check_numbers(settings),
        *_check_report(settings),
        *_check_model(settings),
        *check_fp8(settings),
        *check_lora(settings),
        *check_dataset(settings.dataset),
        *_check_trainer(settings),
        *check_method(settings),
        *check_batch_plan(settings.trainer, processes_of(settings) if is_process_count(settings) else 1),
        *_check_distributed(settings),
        *_check_preflight(settings),
        *check_extra(settings),
        *check_export(settings),
        *check_tracking(settings),
    ]
    if hardware:
        problems += check_packages(settings)
        problems += check_speed(settings, resolve_backend(settings), gpu_present() or settings.preflight.gpu is not None)
    if hardware and settings.preflight.gpu is None:
        problems += _check_hardware(settings)
    return problems


def _check_distributed(settings: Settings) -> list[Problem]:
    wanted, strategy = settings.distributed.num_processes, settings.distributed.strategy
    what, problems = f"distributed.num_processes={wanted}", []
    if not is_process_count(settings):
        return [Problem(what, "It has to be at least 1, or auto for one for each GPU.", "distributed.num_processes=2")]
    count = processes_of(settings)
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count > 1 and "RANK" in os.environ and isinstance(wanted, int) and wanted not in (1, started):
        why = f"torchrun has started {started} processes on this machine, so that {wanted} would be ignored."
        problems.append(Problem(what, why, f"leave it out   or   torchrun --nproc-per-node {wanted} train.py ..."))
    if count == 1 and strategy == Strategy.fsdp and wanted != "auto":  # how many that is, this machine says
        why = "A single process has nothing to share the weights out among."
        fix = "distributed.strategy=ddp   or   distributed.num_processes=2"
        problems.append(Problem("distributed.strategy=fsdp", why, fix))
    if strategy == Strategy.fsdp:
        for bits in ("4bit", "8bit"):
            if getattr(settings.model, f"load_in_{bits}"):
                why = f"{bits[0]}-bit weights are not shared out: each GPU would hold all of them."
                fix = f"model.load_in_{bits}=false   or   distributed.strategy=ddp"
                problems.append(Problem(f"distributed.strategy=fsdp model.load_in_{bits}=true", why, fix))
        if settings.model.backend == Backend.unsloth:
            why = "Unsloth's kernels take whole weights, and each process has a share of them."
            fix = "model.backend=transformers   or   distributed.strategy=ddp"
            problems.append(Problem("distributed.strategy=fsdp model.backend=unsloth", why, fix))
    if count > 1:
        problems += [
            Problem(
                f"trainer.extra.{name}={shown(settings.trainer.extra[name])}",
                f"The {count} processes would not train on the rows that one process does.",
                f"leave trainer.extra.{name} out   or   {one_process(settings)}",
            )
            for name in sorted(ONE_PROCESS & set(settings.trainer.extra))
        ]
    return problems


def _check_preflight(settings: Settings) -> list[Problem]:
    """`preflight.gpu` without `preflight.mode=only`: a run trains on what is there."""
    preflight = settings.preflight
    if preflight.gpu is None or preflight.mode == PreflightMode.only:
        return []
    what = f"preflight.gpu={preflight.gpu.value} preflight.mode={preflight.mode.value}"
    why = "A run trains on the GPU that is here, so that another one's name would be ignored."
    return [Problem(what, why, "preflight.mode=only   to check for that GPU\npreflight.gpu=null   to train")]


def warnings_for(settings: Settings) -> list[str]:
    """What works but is probably not meant: one sentence each, shown at the start and kept in preflight.json."""
    found = []
    trainer, dataset = settings.trainer, settings.dataset
    if trainer.learning_rate >= 3e-3 and settings.lora.enabled:
        found.append(f"trainer.learning_rate={trainer.learning_rate:g} is high: LoRA runs at 3e-3 mostly diverge; try 2e-4.")
    if settings.method.name == MethodName.dpo and trainer.learning_rate > 5e-5 and settings.model.name not in BUILT_IN:
        found.append(f"trainer.learning_rate={trainer.learning_rate:g} is high for method=dpo; try 5e-6.")
    if settings.method.name == MethodName.grpo:
        found += _warn_of_grpo(settings)
    if not settings.lora.enabled and trainer.learning_rate > 5e-5:
        found.append(f"trainer.learning_rate={trainer.learning_rate:g} is high for full fine-tuning; try 2e-5.")
    if not settings.lora.enabled and settings.model.dtype == Dtype.bfloat16:
        found.append(
            "model.dtype=bfloat16 keeps the trained weights in 16 bits, which round most of a step away; "
            "model.dtype=auto keeps them in float32."
        )
    if trainer.max_steps > 0 and trainer.num_train_epochs != 1.0:
        found.append("trainer.num_train_epochs is ignored: trainer.max_steps decides the length.")
    if dataset.path and (dataset.revision or dataset.config_name):
        found.append("dataset.revision and dataset.config_name are ignored: dataset.path is a local file.")
    found += warn_of_paths(dataset)
    if not wants_evaluation(settings) and trainer.load_best_model_at_end:
        found.append("Nothing is held out, so the last weights are kept, not the best (trainer.load_best_model_at_end).")
    if expanded(settings.model.name).is_dir() and settings.model.revision:
        found.append("model.revision is ignored: model.name is a local folder.")
    found += warn_of_tracking(settings.tracking)
    return found


def _warn_of_grpo(settings: Settings) -> list[str]:
    """What of method=grpo is ignored, or rarely goes well."""
    method, rate, found = settings.method, settings.trainer.learning_rate, []
    if rate > 2e-5 and settings.model.name not in BUILT_IN:
        found.append(f"trainer.learning_rate={rate:g} is high for method=grpo; try 5e-6.")
    if method.num_iterations == 1:
        ignored = [key for key in ("epsilon", "epsilon_high") if getattr(method, key) != getattr(MethodSettings(), key)]
        found += [
            f"method.{key} is ignored: with method.num_iterations=1 no ratio of probabilities leaves 1." for key in ignored
        ]
    return found


def wants_evaluation(settings: Settings) -> bool:
    """Whether rows are held out for the evaluation loss."""
    return settings.dataset.eval_fraction > 0 or bool(settings.dataset.eval_split or settings.dataset.eval_path)


def _check_numbers(settings: Settings) -> list[Problem]:
    """Plain ranges: (key, holds, what is allowed)."""
    m, d, lora, t, s = settings.model, settings.dataset, settings.lora, settings.trainer, settings.samples
    rules = [
        ("model.max_seq_length", m.max_seq_length >= 8, "at least 8 tokens"),
        ("dataset.eval_fraction", 0 <= d.eval_fraction < 1, "at least 0 and below 1"),
        ("dataset.max_rows", d.max_rows is None or d.max_rows >= 1, "at least 1, or null"),
        ("dataset.max_eval_rows", d.max_eval_rows is None or d.max_eval_rows >= 1, "at least 1, or null"),
        ("lora.r", lora.r >= 1 or not lora.enabled, "at least 1; lora=none trains without an adapter"),
        ("lora.lora_alpha", 0 < lora.lora_alpha < math.inf, "a number above 0"),
        ("lora.lora_dropout", 0 <= lora.lora_dropout < 1, "at least 0 and below 1"),
        ("trainer.num_train_epochs", 0 < t.num_train_epochs < math.inf, "a number above 0"),
        ("trainer.max_steps", t.max_steps >= 1 or t.max_steps == -1, "at least 1, or -1 for num_train_epochs to decide"),
        ("trainer.per_device_train_batch_size", isinstance(t.per_device_train_batch_size, str)
         or t.per_device_train_batch_size >= 1, "at least 1, or auto"),
        ("trainer.per_device_eval_batch_size", t.per_device_eval_batch_size is None or t.per_device_eval_batch_size >= 1,
         "at least 1, or null"),
        ("trainer.gradient_accumulation_steps", t.gradient_accumulation_steps is None or t.gradient_accumulation_steps >= 1,
         "at least 1, or null"),
        ("trainer.effective_batch_size", t.effective_batch_size is None or t.effective_batch_size >= 1, "at least 1, or null"),
        ("trainer.learning_rate", t.learning_rate > 0 and math.isfinite(t.learning_rate), "above 0, such as 2e-4"),
        ("trainer.warmup_steps", 0 <= t.warmup_steps < math.inf, "a number of at least 0"),
        ("trainer.weight_decay", 0 <= t.weight_decay < math.inf, "a number of at least 0"),
        ("trainer.max_grad_norm", 0 <= t.max_grad_norm < math.inf, "a number of at least 0 (0 does not clip)"),
        ("trainer.logging_steps", t.logging_steps >= 1, "at least 1"),
        ("trainer.eval_steps", t.eval_steps is None or _is_step_count(t.eval_steps),
         "a whole number of steps, a share between 0 and 1, or null"),
        ("trainer.save_steps", _is_step_count(t.save_steps), "a whole number of steps, or a share between 0 and 1"),
        ("samples.every_steps", s.every_steps is None or _is_step_count(s.every_steps),
         "a whole number of steps, a share between 0 and 1, or null"),
        ("trainer.save_total_limit", t.save_total_limit >= 1, "at least 1"),
        ("trainer.max_hours", t.max_hours is None or 0 < t.max_hours < math.inf, "a number above 0, or null"),
        ("trainer.max_memory_gib", t.max_memory_gib is None or 1 <= t.max_memory_gib < math.inf, "at least 1, or null"),
        ("trainer.max_bad_steps", t.max_bad_steps >= 0, "at least 0"),
        ("trainer.early_stopping_patience", t.early_stopping_patience is None or t.early_stopping_patience >= 1,
         "at least 1, or null"),
        ("trainer.early_stopping_threshold", math.isfinite(t.early_stopping_threshold), "a number"),
        ("samples.num_held_out", s.num_held_out >= 0, "at least 0"),
        ("samples.max_new_tokens", s.max_new_tokens >= 1, "at least 1"),
        ("export.num_prompts", settings.export.num_prompts >= 0, "at least 0"),
        ("export.max_loss_increase", 0 < settings.export.max_loss_increase < math.inf, "a number above 0"),
        ("dataset.seed", d.seed is None or 0 <= d.seed < 2**32, "between 0 and 4294967295, or null"),
        ("seed", 0 <= settings.seed < 2**32, "between 0 and 4294967295"),
    ]  # fmt: skip
    return [
        Problem(f"{key}={shown(_get(settings, key))}", f"It has to be {allowed}.", _default(key))
        for key, holds, allowed in rules
        if not holds
    ]


def _check_blank(settings: Settings) -> list[Problem]:
    """Texts that are empty, as an unset shell variable leaves them: they would be taken for null in silence."""
    problems = []
    for group in (f.name for f in fields(Settings) if f.name not in ("seed", "resume")):
        for f in fields(getattr(settings, group)):
            if getattr(getattr(settings, group), f.name) == "":
                key = f"{group}.{f.name}"
                fix = f"{key}=null   for none" if "None" in str(f.type) else _default(key)
                problems.append(Problem(f"{key}=", "The value is empty.", fix))
    return problems


def _check_report(settings: Settings) -> list[Problem]:
    place = settings.report.against
    if not place:
        return []
    why = why_lost(place)
    if not why and not expanded(place).is_dir():
        why = "There is no such folder."
    elif not why and not (expanded(place) / "run.json").is_file():
        why = "There is no run.json, so it is no run's folder."
    return [Problem(typed("report.against", shortened(place)), why, "report.against=null")] if why else []


def _default(key: str) -> str:
    """The hint that names a setting's default."""
    return f"{key}={shown(_get(Settings(), key))}   is the default"


def _is_step_count(value: float) -> bool:
    return 0 < value < 1 or (value >= 1 and float(value).is_integer())


def _check_model(settings: Settings) -> list[Problem]:
    model, problems = settings.model, []
    if model.load_in_4bit and model.load_in_8bit:
        fix = "model.load_in_8bit=false   or   model.load_in_4bit=false"
        problems.append(Problem("model.load_in_4bit=true model.load_in_8bit=true", "Weights are loaded one way only.", fix))
    lost = why_lost(model.name)
    if lost:
        return [*problems, Problem(f"model.name={shortened(model.name)}", lost, _default("model.name"))]
    if model.chat_template and "{" not in model.chat_template and (lost_file := why_lost(model.chat_template)):
        problems.append(
            Problem(f"model.chat_template={shortened(model.chat_template)}", lost_file, "model.chat_template=chatml")
        )
    folder = expanded(model.name)
    if not model.name:
        pass  # refused as blank
    elif folder.is_dir():
        if not (folder / "config.json").is_file():
            problems.append(model_problem(model.name, folder, settings.lora))
        elif any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            problems.append(pickle_problem(model.name))
    elif model.name != "tiny_random" and not re.fullmatch(r"[\w.-]+/[\w.-]+", model.name):
        parent = folder.parent if folder.parent.is_dir() else Path(".")
        close = difflib.get_close_matches(folder.name, [p.name for p in parent.iterdir() if p.is_dir()], 1)
        why = "There is no such folder, and a hub id has the form owner/name."
        fix = typed("model.name", str(parent / close[0])) if close else "model.name=Qwen/Qwen3-4B-Base   for example"
        problems.append(Problem(f"model.name={model.name}", why, fix))
    return problems


def pickle_problem(name: str) -> Problem:
    """The problem of a model whose weights are there only in Python's own format (pytorch_model.bin)."""
    why = "It has no weights as safetensors. Files such as pytorch_model.bin can run code when read, so they never are."
    fix = "https://huggingface.co/spaces/safetensors/convert makes model.safetensors of a model on the hub"
    return Problem(f"model.name={name}", why, fix)


def _check_trainer(settings: Settings) -> list[Problem]:
    trainer, problems = settings.trainer, []
    if trainer.stop_at:
        try:
            moment_of(trainer.stop_at, datetime.now().astimezone())
        except (ValueError, OverflowError) as error:
            fix = "trainer.stop_at=17:30   or   'trainer.stop_at=\"2026-12-31 17:30\"'"
            problems.append(Problem(f"trainer.stop_at={trainer.stop_at}", f"It is no moment: {error}.", fix))
    if trainer.early_stopping_patience and not wants_evaluation(settings):
        why = "Early stopping watches the evaluation loss, and no rows are held out."
        fix = "dataset.eval_fraction=0.1   or   trainer.early_stopping_patience=null"
        problems.append(Problem(f"trainer.early_stopping_patience={trainer.early_stopping_patience}", why, fix))
    if trainer.early_stopping_threshold and not trainer.early_stopping_patience:
        why = "Without a patience nothing stops early, so the threshold would be ignored."
        problems.append(
            Problem(
                f"trainer.early_stopping_threshold={trainer.early_stopping_threshold}", why, "trainer.early_stopping_patience=3"
            )
        )
    for key, enum, file in (
        ("optim", "OptimizerNames", "training_args.py"),
        ("lr_scheduler_type", "SchedulerType", "trainer_utils.py"),
    ):
        value = getattr(trainer, key)
        known = enum_values(file, enum)
        if known and value not in known:
            offered = known if re.search(ON_A_GPU, value) else [k for k in known if not re.search(ON_A_GPU, k)]
            close = [k for k in offered if value and k.startswith(value)] + difflib.get_close_matches(value, offered, 1, 0.5)
            fix = f"trainer.{key}={close[0]}" if close else _default(f"trainer.{key}")
            problems.append(Problem(f"trainer.{key}={value}", f"transformers knows: {', '.join(known)}.", fix))
    if trainer.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and not wants_evaluation(settings):
        why = "This schedule follows the evaluation loss, and no rows are held out."
        fix = "dataset.eval_fraction=0.1   or   trainer.lr_scheduler_type=linear"
        problems.append(Problem(f"trainer.lr_scheduler_type={trainer.lr_scheduler_type}", why, fix))
    return [*problems, *(check_loss(trainer.extra) if settings.method.name == MethodName.sft else [])]


def _check_hardware(settings: Settings) -> list[Problem]:
    model, problems = settings.model, []
    gpu = gpu_present()
    wanted, here = settings.distributed.num_processes, gpu_count()
    if wanted == "auto" and not gpu:
        why = "auto counts the GPUs, and none is found here."
        fix = f"{one_process(settings)}   or   distributed.num_processes=2"
        problems.append(Problem("distributed.num_processes=auto", why, fix))
    elif wanted == "auto" and here == 1 and settings.distributed.strategy == Strategy.fsdp:
        why = "One GPU is found here, and a single process has nothing to share the weights out among."
        problems.append(Problem("distributed.strategy=fsdp", why, "distributed.strategy=ddp"))
    if gpu and isinstance(wanted, int) and wanted > here:
        why = f"Each process needs a GPU of its own, and {here} {'is' if here == 1 else 'are'} found here."
        problems.append(Problem(f"distributed.num_processes={wanted}", why, f"distributed.num_processes={here}"))
    for bits, words in (("4bit", "4-bit weights need an"), ("8bit", "8-bit weights need an"), ("fp8", "FP8 needs an")):
        if getattr(model, f"load_in_{bits}") and not gpu:
            why = f"{words} NVIDIA GPU, and none is found here."
            problems.append(Problem(f"model.load_in_{bits}=true", why, f"model.load_in_{bits}=false"))
    if not gpu and re.search(ON_A_GPU, settings.trainer.optim):
        why = "This optimiser needs an NVIDIA GPU, and none is found here."
        problems.append(Problem(f"trainer.optim={settings.trainer.optim}", why, "trainer.optim=adamw_torch"))
    if not gpu and model.dtype == Dtype.float16 and settings.lora.enabled:
        why = "Training in float16 needs a GPU, and none is found here."
        problems.append(Problem("model.dtype=float16", why, "model.dtype=auto"))
    if model.attn_implementation.value == "flash_attention_2" and not (gpu and importlib.util.find_spec("flash_attn")):
        why = "It needs a GPU and the package flash-attn." if not gpu else "The package flash-attn is not installed."
        problems.append(Problem("model.attn_implementation=flash_attention_2", why, "model.attn_implementation=sdpa"))
    if model.backend == Backend.unsloth and not importlib.util.find_spec("unsloth"):
        why = "Unsloth is not installed."
        problems.append(Problem("model.backend=unsloth", why, 'pip install -e ".[unsloth]"   or   model.backend=transformers'))
    if settings.lora.use_dora and resolve_backend(settings) == "unsloth":
        why = "Unsloth's adapters have no DoRA."
        problems.append(Problem("lora.use_dora=true model.backend=unsloth", why, "model.backend=transformers"))
    if settings.lora.extra and resolve_backend(settings) == "unsloth":
        why = "Unsloth makes adapters of its own, which do not know all of PEFT's options."
        what = " ".join(f"lora.extra.{name}=..." for name in settings.lora.extra)
        problems.append(Problem(f"{what} model.backend=unsloth", why, "model.backend=transformers"))
    return problems


def _get(settings: Settings, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def moment_of(text: str, now: datetime) -> datetime:
    """The moment that `trainer.stop_at` names: the next 17:30, or a date with a time. Raises ValueError."""
    if re.fullmatch(r"\d{1,2}:\d\d", text.strip()):
        hour, minute = map(int, text.split(":"))
        at = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return at if at > now else at + timedelta(days=1)
    if not re.match(r"\d{4}-\d\d-\d\d.\d", text.strip()):
        raise ValueError("neither a time nor a date with a time")
    at = datetime.fromisoformat(text.strip())
    return at.astimezone() if at.tzinfo else at.replace(tzinfo=now.tzinfo)
