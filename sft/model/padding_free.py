"""Padding-free micro-batches in a model: how concatenated rows are kept apart and turned into a loss.

A padded batch spends most of its time on padding where rows differ in length. Here each token is computed once. Attention gets
the ends of the rows and never looks across one (`cu_seq_lens_q`, transformers' own name for them), positions start again with
every row, and the output layer is applied to the places that predict a target token alone. `acceleration._difference` compares
the result with the model's own forward pass before anything is trained.
"""

import contextlib
import functools
import inspect
import types
from typing import Any

from sft.data.collators import pairs
from sft.model.loss import linear_cross_entropy, linear_log_probs
from sft.model.structure import attention_of, decoder_layers

ATTENTION = "sft_padding_free"
"""The attention's name in transformers' registry."""


def obstacle(base: Any) -> str:
    """Why a model's rows cannot be padding-free, as far as it shows without running it; empty if nothing does."""
    import torch

    if getattr(base.config.get_text_config(), "attention_dropout", 0):
        return "the model drops attention weights while it learns"
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return "its output layer is not a plain one"
    # In 16 bits little of these shows in the hidden states that `acceleration._difference` compares.
    if any(isinstance(module, torch.nn.Conv1d) for layer in decoder_layers(base) for module in layer.modules()):
        return "its convolutions run from one row into the next"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} takes no attention of another's making"
    if any(name.endswith(".sinks") for name, _ in base.named_parameters()):
        return "its attention has sinks, which padding-free attention does not"
    if getattr(base.config.get_text_config(), "attn_logit_softcapping", None):
        return "its attention caps its logits, which padding-free attention does not"
    return ""


def install(base: Any) -> None:
    """Let the causal language model `base`, without an adapter around it, take PaddingFreeCollator's micro-batches beside its
    usual input.

    Such a one gives an output with the `loss` alone: summed over target tokens and divided by `num_items_in_batch`, or by
    their number where that is None, as transformers does for padded rows. With `log_probs=True` it gives the log probability of
    each target token instead, as `logits`, of logits divided by `temperature`.
    """
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    usual = base.forward

    def forward(
        self,
        *args: Any,
        target_positions: Any = None,
        targets: Any = None,
        log_probs: bool = False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if target_positions is None:
            return usual(*args, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        for unused in ("labels", "use_cache", "attention_mask"):
            kwargs.pop(unused, None)
        with attention_of(self, ATTENTION):
            if self.graphs and self.training:
                hidden = self.graphs.hidden(kwargs)
            else:
                hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        hidden = hidden[0].index_select(0, target_positions)
        if torch.is_autocast_enabled(hidden.device.type):  # they are float32 where the weights are
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        if log_probs:
            return CausalLMOutputWithPast(logits=linear_log_probs(hidden, head.weight, targets, temperature, cap))
        total = linear_cross_entropy(hidden, head.weight, targets, cap)
        return CausalLMOutputWithPast(loss=total / (len(targets) if items is None else items))

    def contexts() -> tuple[Any, Any]:
        """torch.utils.checkpoint's `context_fn`: what is recomputed in the backward pass attends as at first."""
        return contextlib.nullcontext(), attention_of(base, base.config.get_text_config()._attn_implementation)

    set_checkpointing = base._set_gradient_checkpointing

    def checkpoint_with_contexts(enable: bool = True, gradient_checkpointing_func: Any = None, **options: Any) -> None:
        # The random state is read only where something draws: a step that is captured as a CUDA graph must not do that.
        draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in base.modules())
        more = {"context_fn": contexts, "preserve_rng_state": draws}
        function = functools.partial(gradient_checkpointing_func, **more) if enable else checkpoint
        set_checkpointing(enable, function, **options)

    # `generate` reads there which arguments a model takes that does not name them where it prepares them, as Gemma 4.
    taken = inspect.signature(usual)
    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *taken.parameters.values()]
    forward.__signature__ = taken.replace(parameters=own)
    base.graphs = None  # of sft/model/cuda_graphs.py
    base.forward = types.MethodType(forward, base)
    base._set_gradient_checkpointing = checkpoint_with_contexts


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Causal attention inside each row, in the form of transformers' attention functions.

    query: [1, heads, tokens, width]; key and value may have fewer heads. Returns [1, tokens, heads, width].
    With `key_index` a segment's keys are more than its queries, and aligned at their end (sft/data/shared_prompt.py).
    On a GPU in 16 bits it is one call of the variable-length flash attention that comes with torch; elsewhere torch's usual
    attention, row by row.
    """
    ends, longest, index = kwargs["cu_seq_lens_q"], kwargs["max_length_q"], kwargs.get("key_index")
    key_ends = ends
    if index is not None:
        from sft.model.shared_keys import gather_keys

        key_ends = kwargs["cu_seq_lens_k"]
    # Under autocast rotated queries and keys may be float32 again, which the kernels do not take; values are not rotated.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if index is not None:
            k, v = (gather_keys(x, index, kwargs["key_uses"]) for x in (k, v))
        # The operator under torch.nn.attention.varlen: called directly it costs the host a tenth of that, and it compiles.
        window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
        out = _flash(q, k, v, (ends, key_ends), longest, scaling, window)
        return out.unsqueeze(0), None
    import torch

    if index is not None:
        key, value = (gather_keys(x.transpose(0, 2), index, kwargs["key_uses"]).transpose(0, 2) for x in (key, value))
    pieces = []
    for (a, b), (c, d) in zip(pairs(ends), pairs(key_ends), strict=True):
        q, k, v = query[:, :, a:b], key[:, :, c:d], value[:, :, c:d]
        mask, before = None, d - c - (b - a)
        if before or (sliding_window and d - c > sliding_window):
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(before)
            mask = mask.triu(before + 1 - sliding_window) if sliding_window else mask
        pieces.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _flash(q: Any, k: Any, v: Any, ends: tuple[Any, Any], longest: int, scaling: float | None, window: tuple[int, int]) -> Any:
    import torch

    return torch.ops.aten._flash_attention_forward(
        q, k, v, *ends, longest, longest, 0.0, window == (-1, 0), False, scale=scaling,
        window_size_left=window[0], window_size_right=window[1],
    )[0]  # fmt: skip
