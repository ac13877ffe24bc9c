"""The model, loaded by its backend."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft import environment
from sft.config.schema import Attention, Settings
from sft.distributed import strategy
from sft.errors import Refusal
from sft.model.backend import torch_dtype, unsloth_checkpointing
from sft.model.files import check_model_files
from sft.model.hub import adapter_problem, locate, refusing_failures
from sft.plan.plan import Plan

log = logging.getLogger(__name__)


def load_model(settings: Settings, plan: Plan, loss_of: Callable[[Any], float | None] | None = None) -> tuple[Any, str]:
    """The model in memory, on the GPU where there is one, and the source of its weights for the record.

    `loss_of` says what a model loses on some rows: taken before and after its weights are rounded to FP8.
    """
    model = settings.model
    where, source = locate(model)
    if Path(where).is_dir() and (problems := check_model_files(Path(where), model)):
        raise Refusal(problems)
    if problems := adapter_problem(model, settings.lora):
        raise Refusal(problems)
    with refusing_failures(model):
        load = _load_unsloth if plan.backend == "unsloth" else _load_transformers
        loaded = load(settings, plan, where)
    if model.load_in_fp8:
        _round(loaded, plan.fp8_transposed, loss_of)
    commit = getattr(loaded.config, "_commit_hash", None)
    return loaded, f"{source} at {commit}" if commit and source.startswith("hub") else source


def _load_unsloth(settings: Settings, plan: Plan, where: str) -> Any:
    from unsloth import FastLanguageModel

    model = settings.model
    options: dict[str, Any] = {}
    if model.attn_implementation != Attention.auto:
        options["attn_implementation"] = model.attn_implementation.value
    if plan.weights_dtype != plan.dtype:  # an option that it has on GPUs alone
        options["float32_mixed_precision"] = True
    loaded, _ = FastLanguageModel.from_pretrained(
        model_name=where,
        revision=model.revision,
        max_seq_length=model.max_seq_length,
        dtype=torch_dtype(plan.dtype),
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        full_finetuning=not settings.lora.enabled,
        trust_remote_code=model.trust_remote_code,
        use_safetensors=True,  # as in _load_transformers
        use_gradient_checkpointing=unsloth_checkpointing(plan.checkpointing),
        **options,
    )
    return loaded


def _load_transformers(settings: Settings, plan: Plan, where: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = settings.model
    # Weights in Python's own format can run code when they are read; safetensors cannot.
    dtype = torch_dtype(plan.weights_dtype)
    options: dict[str, Any] = {"dtype": dtype, "revision": model.revision, "use_safetensors": True}
    if model.attn_implementation != Attention.auto:
        options["attn_implementation"] = model.attn_implementation.value
    if model.load_in_4bit and "bnb-4bit" not in where:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype(plan.dtype),
        )
    if model.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if torch.cuda.is_available() and not strategy.shards(settings):  # else each process takes its share from main memory
        options["device_map"] = {"": torch.cuda.current_device()}  # each process has its own
    return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=model.trust_remote_code, **options)


def _round(model: Any, keep_transposed: bool, loss_of: Callable[[Any], float | None] | None) -> None:
    """Round the layers of a model to FP8, and say what that costs. What a run has trained may also be used where there is no
    FP8: there the weights stay as they are."""
    from sft.model import fp8

    if not fp8.is_supported(model.device, model.dtype):
        log.warning("FP8 is for bfloat16 on a GPU that has it: here the model stays in %s, other than as it was trained.",
                    f"{model.dtype}".removeprefix("torch."))  # fmt: skip
        return
    before = loss_of(model) if loss_of else None
    layers, others = fp8.round_layers(model, keep_transposed)
    environment.release_memory()  # that of the weights as they were
    facts: dict[str, Any] = {"layers": layers, "not_rounded": others}
    cost = ""
    if loss_of and before is not None and (after := loss_of(model)) is not None:
        facts |= {"loss_in_16_bits": round(before, 6), "loss_in_fp8": round(after, 6)}
        cost = f"; the untrained model's loss {before:.4f} becomes {after:.4f} ({after - before:+.4f})"
    kept = f", {others} with sizes that are no multiple of {fp8.MULTIPLE} stay in 16 bits" if others else ""
    log.info("FP8    %s frozen layers rounded%s%s", layers, kept, cost)
    model.rounding = facts
