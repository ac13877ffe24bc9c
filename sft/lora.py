"""Put the adapter on the model, under PEFT's names."""

from typing import Any

from sft.errors import refuse
from sft.models import unsloth_checkpointing, uses_checkpointing
from sft.settings import Settings


def base_of(model: Any) -> Any:
    """The causal language model under an adapter, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach(model: Any, settings: Settings, backend: str) -> Any:
    """The model with a LoRA adapter; the model itself with every weight trainable if `lora.enabled` is false.

    The adapter starts from `seed` in both backends, so they start from the same weights.
    Raises Refusal if `lora.target_modules` names a layer that the model does not have.
    """
    lora = settings.lora
    if not lora.enabled:
        model.requires_grad_(True)
        return model
    targets: str | list[str] = "all-linear" if lora.target_modules == ["all-linear"] else list(lora.target_modules)
    if isinstance(targets, list):
        _check_targets(model, targets)
    options = {
        "r": lora.r,
        "lora_alpha": int(lora.lora_alpha) if float(lora.lora_alpha).is_integer() else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets,
        "bias": lora.bias.value,
        "use_rslora": lora.use_rslora,
        "modules_to_save": list(lora.modules_to_save) or None,
    }
    if backend == "unsloth":
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model,
            use_gradient_checkpointing=unsloth_checkpointing(settings),
            random_state=settings.seed,
            max_seq_length=settings.model.max_seq_length,
            **options,
        )
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    if settings.model.load_in_4bit or settings.model.load_in_8bit:
        _freeze_quantized(model, uses_checkpointing(settings))
    set_seed(settings.seed)
    # Trained copies of tied layers stay one, as in the model itself; two would differ, and a merge could keep only one.
    tied = bool({"embed_tokens", "lm_head"} & set(lora.modules_to_save)) and model.config.tie_word_embeddings
    config = LoraConfig(task_type="CAUSAL_LM", use_dora=lora.use_dora, ensure_weight_tying=tied, **options)
    return get_peft_model(model, config)


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


def _check_targets(model: Any, targets: list[str]) -> None:
    import torch

    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name, _ in model.named_modules())]
    if missing:
        raise refuse(
            f"lora.target_modules=[{','.join(targets)}]",
            f"The model has no layer named {', '.join(missing)}. Its linear layers are: {', '.join(sorted(linear))}.",
            "lora.target_modules=[all-linear]",
        )


def count_parameters(model: Any) -> tuple[int, int]:
    """(all parameters, trained parameters); a 4-bit weight counts as the values it packs."""
    total = trained = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        count = parameter.numel() * (2 * parameter.element_size() if packed else 1)
        total += count
        trained += parameter.numel() if parameter.requires_grad else 0
    return total, trained
