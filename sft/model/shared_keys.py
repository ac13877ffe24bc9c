"""The keys and values of a prompt, given to each answer behind it (sft/data/shared_prompt.py)."""

from typing import Any

import torch


class GatherKeys(torch.autograd.Function):
    """`x` [tokens, ...] by `index` [keys]. The keys that a token is are named by `uses` [most, tokens]: its gradient is
    gathered as well, in a fixed order. Keys of no segment have no gradient; attention leaves there what was in the memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, index: Any, uses: Any) -> Any:
        ctx.save_for_backward(uses)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, None, None]:
        (uses,) = ctx.saved_tensors
        total = grad.index_select(0, uses[0])
        for more in uses[1:]:
            again = more < len(grad)
            further = grad.index_select(0, torch.where(again, more, 0))
            again = again.view(-1, *[1] * (grad.dim() - 1))
            total = total + torch.where(again, further, torch.zeros_like(further))
        return total, None, None


def gather_keys(x: Any, index: Any, uses: Any) -> Any:
    """The keys or values of all segments, [keys, heads, width], from those of the tokens."""
    return GatherKeys.apply(x, index, uses)
