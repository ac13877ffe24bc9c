"""Frozen 4-bit layers in a form that a compiler can see through.

bitsandbytes keeps a layer's scales in a Python object beside a tensor of its own kind, which breaks a compiled decoder layer in
pieces. Here the layer holds plain tensors: the packed weights as they are, and the scales of 64 weights each, unpacked once
(0.06 bytes a weight more than the double quantisation they come in). The values of the weights are the same to the bit.
To be imported where there are such layers: it imports torch, whose compiler does not follow a class made in a function.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional


class OpenLinear4bit(bnb.nn.Linear4bit):
    """An nf4 layer that uses `multiply` where gradients are wanted; generation keeps the library's kernel for one token."""

    def forward(self, x: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return multiply(x, self.packed, self.scales, self.rows, self.columns)


def open_layers(base: Any) -> int:
    """Give every nf4 layer of `base` the form of this module; their number. Nothing is copied but the scales."""
    layers = [
        m for m in base.modules()
        if isinstance(m, bnb.nn.Linear4bit) and m.bias is None and m.weight.quant_state.quant_type == "nf4"
        and m.weight.quant_state.blocksize == 64
    ]  # fmt: skip
    for layer in layers:
        state = layer.weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        layer.packed = layer.weight.detach().as_subclass(torch.Tensor).view(-1)
        layer.scales = scales.float()
        layer.rows, layer.columns = state.shape
        layer.__class__ = OpenLinear4bit
    return len(layers)


def multiply(x: Any, packed: Any, scales: Any, rows: int, columns: int) -> Any:
    """`x` [..., columns] times the transposed weight [rows, columns] that `packed` holds; `packed` gets no gradient."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return Product.apply(x, packed, scales, rows, columns)


def _weight(packed: Any, scales: Any, rows: int, columns: int, dtype: Any) -> Any:
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, 64, "nf4", (rows, columns), dtype)


class Product(torch.autograd.Function):
    """`x` times the transposed weight."""

    @staticmethod
    def forward(ctx, x, packed, scales, rows, columns):
        ctx.save_for_backward(packed, scales)
        ctx.size = rows, columns
        return torch.nn.functional.linear(x, _weight(packed, scales, rows, columns, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        packed, scales = ctx.saved_tensors
        # Another view of the same bytes: a compiler that saw the same call twice would keep the whole weight in between.
        weight = _weight(packed.view(1, -1), scales, *ctx.size, grad.dtype)
        return grad @ weight, None, None, None, None
