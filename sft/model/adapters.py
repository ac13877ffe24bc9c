"""Put the adapter on the model, under PEFT's names, and save it so that plain PEFT loads it on the model as it is."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.lora_rules import changes_base
from sft.config.schema import Settings
from sft.errors import Refusal
from sft.model.backend import unsloth_checkpointing
from sft.model.start import check_start, load_start
from sft.model.targets import check_modules, coverage, options_of
from sft.plan.plan import Plan

__all__ = ["attach", "check_modules", "coverage", "save_adapter", "without_adapter"]


def attach(model: Any, settings: Settings, plan: Plan) -> Any:
    """The model with a LoRA adapter; the model itself with every weight trainable if `lora.enabled` is false.

    The adapter starts from `seed` in both backends, so they start from the same weights, or from `lora.start_from`.
    Raises Refusal as `check_modules` finds problems: the last word where sft/preflight/checks.py had no model to ask.
    """
    lora = settings.lora
    if not lora.enabled:
        model.requires_grad_(True)
        return model
    problems, _ = check_modules(model, lora)
    problems = problems or coverage(model, lora)[1]
    problems += check_start(settings, model)[0] if lora.start_from and not problems else []
    if problems:
        raise Refusal(problems)
    options = options_of(model, lora)
    if plan.backend == "unsloth":
        from unsloth import FastLanguageModel

        adapted = FastLanguageModel.get_peft_model(
            model,
            use_gradient_checkpointing=unsloth_checkpointing(plan.checkpointing),
            random_state=settings.seed,
            max_seq_length=settings.model.max_seq_length,
            **{key: value for key, value in options.items() if key not in ("use_dora", "ensure_weight_tying")},
        )
        return load_start(adapted, lora) if lora.start_from else adapted
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    if settings.model.load_in_4bit or settings.model.load_in_8bit:
        _freeze_quantized(model, plan.checkpointing)
    set_seed(settings.seed)
    with warnings.catch_warnings():  # PEFT's own way back has no place for them; that of `save_adapter` has
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern")
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    if changes_base(lora):
        adapted.adapter_start = _matrices(adapted)
    return load_start(adapted, lora) if lora.start_from else adapted


def save_adapter(model: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Save the adapter for the model as it was loaded. `weights` are those of the whole model, where this process has only a
    share of them.

    PiSSA and OLoRA take the adapter's start out of the model's weights. What was trained is then the adapter less its start,
    of twice the rank: [B, -B0] [A; A0] on the weights as they were.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = any(isinstance(end, LoraLayer | ModulesToSaveWrapper) for end in ends)
    given = {} if weights is None else {"state_dict": weights}
    model.save_pretrained(str(folder), save_embedding_layers=kept, **given)
    if start := getattr(model, "adapter_start", None):
        _take_start_off(folder, start)


def _matrices(model: Any) -> dict[str, Any]:
    """A copy of the adapter's matrices, under the names that they are saved by."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items() if ".lora_" in name}


def _take_start_off(folder: Path, start: dict[str, Any]) -> None:
    """Turn the saved adapter into one for the model as it was before `start` was taken out of it."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, place = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    trained = load_file(weights)
    for name in [n for n in trained if n in start and "magnitude" not in n]:
        a = ".lora_A" in name or ".lora_embedding_A" in name
        parts = [trained[name], start[name].to(trained[name].dtype) * (1 if a else -1)]
        trained[name] = torch.cat(parts, dim=0 if a else 1).contiguous()
    save_file(trained, weights, metadata={"format": "pt"})
    config = json.loads(place.read_text(encoding="utf-8"))
    factor = 2**0.5 if config.get("use_rslora") else 2  # which keeps alpha / r, or alpha / sqrt(r)
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    config["rank_pattern"] = {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()}
    place.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _freeze_quantized(model: Any, checkpointing: bool) -> None:
    """Ready a 4-bit or 8-bit model for training.

    In bfloat16 everything else stays as it is: PEFT's own preparation makes the norms, the embeddings and the output layer
    float32, 4 GB more for a vocabulary of 128,256 and a slower loss. float16, whose range is small, is left to PEFT.
    """
    import torch
    from peft import prepare_model_for_kbit_training

    if model.dtype != torch.bfloat16:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        return
    model.requires_grad_(False)
    if checkpointing:
        model.enable_input_require_grads()


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Switch the adapter off inside the block."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trained:  # PEFT makes all of an adapter trainable as it comes back
            parameter.requires_grad_(requires_grad)
