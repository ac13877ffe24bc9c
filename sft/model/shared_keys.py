"""The keys and values of a prompt, given to both answers behind it (sft/data/shared_prompt.py)."""

from typing import Any

import torch


class GatherKeys(torch.autograd.Function):
    """`x` [tokens, ...] by `index` [keys]. A token is at most two keys, which `uses` [2, tokens] names: its gradient is
    gathered as well, in a fixed order. Keys of no segment have no gradient; attention leaves there what was in the memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, index: Any, uses: Any) -> Any:
        ctx.save_for_backward(uses)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, None, None]:
        (uses,) = ctx.saved_tensors
        again = uses[1] < len(grad)
        second = grad.index_select(0, torch.where(again, uses[1], 0))
        again = again.view(-1, *[1] * (grad.dim() - 1))
        return grad.index_select(0, uses[0]) + torch.where(again, second, torch.zeros_like(second)), None, None


def gather_keys(x: Any, index: Any, uses: Any) -> Any:
    """The keys or values of all segments, [keys, heads, width], from those of the tokens."""
    return GatherKeys.apply(x, index, uses)
