"""Rows laid end to end in one long row, without padding: how they are put together, kept apart, and turned into a loss.

A padded batch spends most of its time on padding where rows differ in length. Here each token is computed once. Attention gets
the ends of the rows and never looks across one (`cu_seq_lens_q`, transformers' own name for them), positions start again with
every row, and the output layer is applied to the places that predict a learnt token alone. `differs` holds the result against
the model's own forward pass before anything is trained.
"""

import contextlib
import functools
import itertools
import types
from dataclasses import dataclass
from typing import Any

from sft.distributed import world_size
from sft.linear_loss import linear_cross_entropy
from sft.render import IGNORED

ATTENTION = "sft_flat"
"""The attention's name in transformers' registry."""


@dataclass
class EndToEnd:
    """Puts rows together; takes the place of TRL's collator."""

    pad_token_id: int
    longest: int
    """Tokens in the longest row there is: one number for a whole run, so that nothing is compiled or recorded twice for it."""
    lengths: tuple[int, ...] = ()
    """Lengths that a pass is filled up to, shortest first, because each is recorded as a CUDA graph. A longer pass is left as
    it is; so is every pass if there are none."""
    rows: int = 0
    """Rows of a whole pass. The ends of fewer rows are filled up to as many, for the same reason."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One pass of `rows` (`input_ids`, `labels`: lists or arrays), as a model with `install` takes it.

        input_ids, position_ids, labels: [1, tokens]; the first label of a row is IGNORED, since nothing predicts it.
        cu_seq_lens_q, cu_seq_lens_k: int32, the start of every row and the ends of the last one and of the filling behind it.
        learnt: the places whose output predicts a learnt token; targets: these tokens.
        """
        import numpy as np
        import torch

        counts = [len(row["input_ids"]) for row in rows]
        total = sum(counts)
        filling = next((n - total for n in self.lengths if n >= total), 0)
        if filling > self.longest:  # attention is launched for rows up to `longest`
            filling = 0
        ids = np.full(total + filling, self.pad_token_id)
        labels = np.full(total + filling, IGNORED)
        np.concatenate([row["input_ids"] for row in rows], out=ids[:total])
        np.concatenate([row["labels"] for row in rows], out=labels[:total])
        starts = np.cumsum([0, *counts])
        labels[starts[:-1]] = IGNORED
        positions = np.arange(total + filling) - np.repeat(starts, [*counts, filling])
        learnt = np.flatnonzero(labels != IGNORED) - 1
        ends = [*starts, *[total] * (self.rows - len(rows)), total + filling]
        cu_seq_lens = torch.tensor(ends, dtype=torch.int32)
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": torch.from_numpy(labels)[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "learnt": torch.from_numpy(learnt),
            "targets": torch.from_numpy(labels[learnt + 1]),
        }


def is_flat(inputs: dict[str, Any]) -> bool:
    """Whether a pass was put together by EndToEnd."""
    return "learnt" in inputs


def cut(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The rows of any pass, without padding: padded ones by their mask, flat ones by their ends.

    Passes that Unsloth lays end to end are cut where positions start again.
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    if mask is not None:
        places = [(i, 0, int(n)) for i, n in enumerate(mask.sum(-1).tolist())]
    elif is_flat(inputs):
        places = [(0, a, b) for a, b in _pairs(inputs["cu_seq_lens_q"][:-1])]  # the last row is the filling
    else:
        starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        places = [(0, a, b) for a, b in zip(starts, [*starts[1:], ids.shape[-1]], strict=True)]
    return [{"input_ids": ids[i, a:b].tolist(), "labels": labels[i, a:b].tolist()} for i, a, b in places]


def count_tokens(inputs: dict[str, Any]) -> Any:
    """Tokens of a pass without padding, as a number or still on the device.

    With several processes rows of one token are fillers and not counted: a row to learn from has two or more.
    """
    import torch

    mask = inputs.get("attention_mask")  # rows that Unsloth lays end to end have none, and no padding either
    if world_size() == 1:
        if is_flat(inputs):
            return inputs["cu_seq_lens_q"][-2]
        return inputs["input_ids"].numel() if mask is None else mask.sum()
    if mask is not None:
        lengths = mask.sum(-1)
    elif is_flat(inputs):
        lengths = inputs["cu_seq_lens_q"][:-1].diff()
    else:
        starts = inputs["position_ids"].flatten() == 0
        fillers = starts & torch.cat([starts[1:], starts.new_ones(1)])
        return inputs["input_ids"].numel() - fillers.sum()
    return (lengths * (lengths > 1)).sum()


def install(base: Any) -> None:
    """Let the causal language model `base`, without an adapter around it, take passes of EndToEnd beside its usual input.

    A flat pass gives an output with the `loss` alone: summed over learnt tokens and divided by `num_items_in_batch`, or by
    their number where that is None, as transformers does for padded rows.
    """
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    usual = base.forward

    def forward(self, *args: Any, learnt: Any = None, targets: Any = None, **kwargs: Any) -> Any:
        if learnt is None:
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
        hidden = hidden[0].index_select(0, learnt)
        if torch.is_autocast_enabled(hidden.device.type):  # they are float32 where the weights are
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        total = linear_cross_entropy(hidden, head.weight, targets)
        return CausalLMOutputWithPast(loss=total / (len(targets) if items is None else items))

    def contexts() -> tuple[Any, Any]:
        """torch.utils.checkpoint's `context_fn`: what is computed again, in the backward pass, attends as at first."""
        return contextlib.nullcontext(), attention_of(base, base.config.get_text_config()._attn_implementation)

    set_checkpointing = base._set_gradient_checkpointing

    def checkpoint_with_contexts(enable: bool = True, gradient_checkpointing_func: Any = None, **options: Any) -> None:
        # The random state is asked for only where something draws: a pass that is recorded as a CUDA graph must not do that.
        draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in base.modules())
        more = {"context_fn": contexts, "preserve_rng_state": draws}
        function = functools.partial(gradient_checkpointing_func, **more) if enable else checkpoint
        set_checkpointing(enable, function, **options)

    base.graphs = None  # of sft/graphs.py
    base.forward = types.MethodType(forward, base)
    base._set_gradient_checkpointing = checkpoint_with_contexts


class attention_of:
    """Inside the block a model attends by the function registered as `name`; outside by its own, which generation needs."""

    def __init__(self, model: Any, name: str):
        self.config, self.name = model.config.get_text_config(), name

    def __enter__(self) -> None:
        self.before, self.config._attn_implementation = self.config._attn_implementation, self.name

    def __exit__(self, *error: Any) -> None:
        self.config._attn_implementation = self.before


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
    On a GPU in 16 bits it is one call of the variable-length flash attention that comes with torch; elsewhere torch's usual
    attention, row by row.
    """
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    # Under autocast rotated queries and keys may be float32 again, which the kernels do not take; values are not rotated.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        # The operator under torch.nn.attention.varlen: called directly it costs the host a tenth of that, and it compiles.
        window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
        out = _flash(q, k, v, ends, longest, scaling, window)
        return out.unsqueeze(0), None
    import torch

    pieces = []
    for a, b in _pairs(ends):
        q, k, v = (x[:, :, a:b] for x in (query, key, value))
        mask = None
        if sliding_window and b - a > sliding_window:
            mask = torch.ones(b - a, b - a, dtype=torch.bool).tril().triu(1 - sliding_window)
        pieces.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _flash(q: Any, k: Any, v: Any, ends: Any, longest: int, scaling: float | None, window: tuple[int, int]) -> Any:
    import torch

    return torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, window == (-1, 0), False, scale=scaling,
        window_size_left=window[0], window_size_right=window[1],
    )[0]  # fmt: skip


def _pairs(ends: Any) -> list[tuple[int, int]]:
    places = ends.tolist()
    return [(a, b) for a, b in itertools.pairwise(places) if b > a]
