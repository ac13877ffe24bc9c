"""A model's dimensions by its config.json, before a weight is loaded."""

from typing import Any

from sft.config.schema import Settings
from sft.model import targets
from sft.plan.memory import ModelDims


def empty_model(settings: Settings, where: str) -> tuple[Any, Any]:
    """(the model at `where`, a folder or hub id, without its weights; its config): reads its config.json alone.

    Raises what transformers does for a config that cannot be had.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    consent = settings.model.trust_remote_code  # said either way: unsaid, transformers asks on the terminal
    config = AutoConfig.from_pretrained(where, revision=settings.model.revision, trust_remote_code=consent)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=consent), config


def dims_of(model: Any, config: Any, settings: Settings) -> ModelDims | None:
    """The shape of a model on the meta device, with the adapter of `settings`; None for a mixture of experts, which this does
    not estimate."""
    import torch

    text, lora = config.get_text_config(), settings.lora
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        return None
    output = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not output}
    parameters = sum(p.numel() for p in model.parameters())
    adapted = {n: linear[n] for n in targets.reached(model, lora) if n in linear} if lora.enabled else {}
    trained = sum(
        targets.rank_of(n, lora) * (m.in_features + m.out_features) + (m.out_features if lora.use_dora else 0)
        for n, m in adapted.items()
    )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora.modules_to_save:
            trained += sum(p.numel() for p in module.parameters())
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelDims(
        parameters=parameters,
        packed=sum(m.weight.numel() for m in linear.values()),
        trained=trained if lora.enabled else parameters,
        adapted_inputs=sum(m.in_features for m in adapted.values()),
        largest=max(m.weight.numel() for m in linear.values()),
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        query_size=head * text.num_attention_heads,
        key_value_size=head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        vocab_size=text.vocab_size,
    )
