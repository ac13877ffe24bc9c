"""A model's dimensions by its config.json, before a weight is loaded."""

from typing import Any

from sft.config.schema import Settings
from sft.model import padding_free, targets
from sft.model.structure import decoder_layers
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
    reached = targets.reached(model, lora) if lora.enabled else {}
    adapted = {n: linear[n] for n in reached if n in linear}
    trained = sum(
        targets.rank_of(n, lora) * (m.in_features + m.out_features) + (m.out_features if lora.use_dora else 0)
        for n, m in adapted.items()
    )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora.modules_to_save:
            trained += sum(p.numel() for p in module.parameters())
    queries, keys, widest = _head_widths(text)
    others, mixing, mixing_float = _mixed_otherwise(model, queries, keys)
    attending = 1 - others / text.num_hidden_layers  # share of the layers
    layers = [module for layer in decoder_layers(model) for module in layer.modules()]
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
        query_size=round(attending * queries),
        key_value_size=round(attending * keys),
        vocab_size=text.vocab_size,
        inner_results=6 if any(hasattr(m, "gate_up_proj_bias") and hasattr(m, "limit") for m in layers) else 3,
        norms=_further_norms(model, text, queries, keys),
        mixing=round(mixing / text.num_hidden_layers),
        mixing_float=round(mixing_float / text.num_hidden_layers),
        sinks=any(hasattr(m, "sinks") for m in layers),
        whole_logits=getattr(text, "logits_scaling", 1) != 1 or output in reached.values(),
        widest_head=widest,
        why_padded=padding_free.obstacle(model),
    )


def _head_widths(text: Any) -> tuple[int, int, int]:
    """(width of all query heads of a layer together, of all key heads, of the widest head): the first two on average over the
    layers, for those of Gemma 4 differ."""
    configs = list(getattr(text, "per_layer_config", None) or [text])
    heads = [(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads, c) for c in configs]
    queries = sum(width * c.num_attention_heads for width, c in heads)
    keys = sum(width * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) for width, c in heads)
    return round(queries / len(heads)), round(keys / len(heads)), max(width for width, _ in heads)


def _further_norms(model: Any, text: Any, queries: int, keys: int) -> int:
    """Width of the RMSNorms of a layer beside two of hidden_size, on average. One of heads, named after queries, keys or
    values, has a head's weights and is as wide as all of them."""
    widths = 0
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                heads = {"q": queries, "k": keys, "v": keys}.get(name.rpartition(".")[2].partition("_")[0], 0)
                weight = getattr(module, "weight", None)  # Gemma 4's of values has none
                widths += max(heads, 0 if weight is None else weight.numel())
    return max(0, round(widths / text.num_hidden_layers) - 2 * text.hidden_size)


def _mixed_otherwise(model: Any, queries: int, keys: int) -> tuple[int, int, int]:
    """(layers without attention, values that token mixers keep of a token beside attention's, those in float32), of all layers
    together.

    Gated delta nets by torch_chunk_gated_delta_rule of modeling_qwen3_5.py, which computes a chunk of 64 tokens at a time; the
    kernels of flash-linear-attention keep less. Under autocast what it multiplies is there in both types. Short convolutions by
    modeling_lfm2.py: what is projected, what is convolved, and the result. A gate on attention's result is kept, and the result
    that it multiplies. Of queries, keys and values that are projected as one, the values keep the whole.
    """
    layers = mixing = mixing_float = 0
    for module in (m for layer in decoder_layers(model) for m in layer.modules()):
        if hasattr(module, "head_k_dim") and hasattr(module, "conv1d"):
            heads, chunk = module.num_v_heads, 64
            key, value = heads * module.head_k_dim, heads * module.head_v_dim
            pairs, states = heads * chunk, key * module.head_v_dim // chunk
            mixing += 7 * key + 3 * (pairs + value) + 2 * (states + module.conv1d.in_channels)
            mixing_float += 6 * key + 2 * pairs + 5 * value + states
            layers += 1
        elif hasattr(module, "L_cache") and hasattr(module, "conv"):
            mixing += 5 * module.conv.in_channels
            layers += 1
        elif getattr(getattr(module, "q_proj", None), "out_features", 0) == 2 * queries:
            mixing += 2 * queries
        elif hasattr(module, "qkv_proj"):
            mixing += queries + keys
    return layers, mixing, mixing_float


def _feed_forward_widths(model: Any, text: Any) -> tuple[int, int] | None:
    """(the width between the two products of the feed-forward block, the width of its experts' results), of what a token goes
    through, on average over the layers; the second is 0 where there are no experts. None where it cannot be told."""
    if not (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)):
        names = ("up_proj", "w1")  # LFM2 rounds the config's width, some layers of Gemma 4 double it
        found = [m.out_features for layer in decoder_layers(model) for n, m in layer.named_modules()
                 if n.rpartition(".")[2] in names and hasattr(m, "out_features")]  # fmt: skip
        return (round(sum(found) / len(found)) if found else text.intermediate_size), 0
    count, blocks = getattr(text, "num_experts_per_tok", None), targets.count_expert_blocks(model)
    if not count or not blocks:
        return None
    inner = count * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
    inner += getattr(text, "shared_expert_intermediate_size", None) or 0
    share, dense = blocks / text.num_hidden_layers, getattr(text, "intermediate_size", None) or inner
    return round(share * inner + (1 - share) * dense), round(share * count * text.hidden_size)
