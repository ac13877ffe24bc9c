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
    """The shape of a model on the meta device, with the adapter of `settings`; None for a mixture of experts with an adapter on
    these, or whose config names its widths otherwise."""
    import torch

    text, lora = config.get_text_config(), settings.lora
    widths = _feed_forward_widths(model, text)
    if widths is None or (lora.enabled and targets.parameters_of(model, lora.extra.get("target_parameters") or [])):
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
        intermediate_size=widths[0],
        routed=widths[1],
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        query_size=head * text.num_attention_heads,
        key_value_size=head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        vocab_size=text.vocab_size,
    )


def _feed_forward_widths(model: Any, text: Any) -> tuple[int, int] | None:
    """(the width between the two products of the feed-forward block, the width of its experts' results), of what a token goes
    through, on average over the layers; the second is 0 where there are no experts. None where it cannot be told."""
    if not (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)):
        return text.intermediate_size, 0
    count, blocks = getattr(text, "num_experts_per_tok", None), targets.count_expert_blocks(model)
    if not count or not blocks:
        return None
    inner = count * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
    inner += getattr(text, "shared_expert_intermediate_size", None) or 0
    share, dense = blocks / text.num_hidden_layers, getattr(text, "intermediate_size", None) or inner
    return round(share * inner + (1 - share) * dense), round(share * count * text.hidden_size)
