"""Frozen layers in FP8: e4m3 weights and inputs, multiplied at twice the rate of bfloat16.

Under LoRA the base never changes, so its weights are rounded once, when the model is loaded; what they are multiplied with is
rounded in each product. Each row of either, the values of one token or those of one output, has a scale of its own in float32
("rowwise" in torch). Gradients of the inputs are products with the very same rounded weights. The weights get no gradient, and
adapters, norms, embeddings and the output layer stay as they are.

Needs torch's `scaled_mm`: compute capability 8.9 or higher, or a CPU, where it is slow.
To be imported where there are such layers: it imports torch, whose compiler does not follow a class made in a function.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear

from sft.model.structure import decoder_layers

LARGEST = 448.0
"""The largest number of e4m3."""

MULTIPLE = 16
"""What both sizes of a weight have to be a multiple of (cuBLAS)."""

TWO_FORMS = True


class Fp8Linear(torch.nn.Linear):
    """A frozen layer whose `weight` holds nothing but NaN, so that nobody computes with it unseen: it keeps the shape, the type
    and the device that PEFT asks for, in two bytes.
    """

    def forward(self, x: Any) -> Any:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        out = Product.apply(rows, self.rounded, self.scales, self.turned, self.turned_scales)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Product(torch.autograd.Function):
    """`x` [tokens, columns] times the transposed weight [rows, columns], which is `rounded` times `scales` [rows, 1]."""

    @staticmethod
    def forward(ctx, x, rounded, scales, turned, turned_scales):
        ctx.save_for_backward(turned, turned_scales) if TWO_FORMS else ctx.save_for_backward(rounded, scales)
        return multiply(x, rounded, scales)

    @staticmethod
    def backward(ctx, grad):
        if TWO_FORMS:
            return multiply(grad, *ctx.saved_tensors), None, None, None, None
        rounded, scales = ctx.saved_tensors
        ones = scales.new_ones(rounded.shape[1], 1)
        return multiply(grad * scales.to(grad.dtype).T, rounded.T.contiguous(), ones), None, None, None, None


def multiply(x: Any, rounded: Any, scales: Any) -> Any:
    """`x` [tokens, columns], rounded row by row, times the transposed weight [rows, columns], in the type of `x`."""
    values, of_rows = round_rows(x)
    # torch's compiler knows this one and not yet the public torch.nn.functional.scaled_mm.
    return torch._scaled_mm(values, rounded.T, of_rows, scales.T, out_dtype=x.dtype, use_fast_accum=True)


def round_rows(x: Any) -> tuple[Any, Any]:
    """(`x` [rows, columns] in e4m3, scales [rows, 1] in float32 by which it is to be multiplied): the largest value of each
    row becomes the largest number there is.
    """
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scales).to(torch.float8_e4m3fn).contiguous(), scales


def is_supported(device: Any) -> bool:
    """Whether the device can multiply such weights."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def round_layers(base: Any) -> tuple[int, int]:
    """Round the linear layers in the decoder layers of `base`; how many are, and how many could not be. One at a time, so
    that no second copy of the model is needed.
    """
    found = {m for layer in decoder_layers(base) for m in layer.modules() if type(m) is torch.nn.Linear}
    fitting = [m for m in found if not any(size % MULTIPLE for size in m.weight.shape)]
    for layer in fitting:
        weight = layer.weight.data
        layer.rounded, layer.scales = round_rows(weight)
        layer.turned, layer.turned_scales = round_rows(weight.T.contiguous()) if TWO_FORMS else (None, None)
        empty = weight.new_full((1, 1), float("nan")).expand(weight.shape)
        layer.weight = torch.nn.Parameter(empty, requires_grad=False)
        layer.__class__ = Fp8Linear
    return len(fitting), len(found) - len(fitting)


@contextlib.contextmanager
def inputs_in_16_bits(base: Any) -> Iterator[None]:
    """Inside the block inputs are not rounded: what is computed twice differs by the noise of 16 bits. Not for gradients."""
    layers = [m for m in base.modules() if type(m) is Fp8Linear]
    for layer in layers:
        layer.forward = lambda x, layer=layer: linear(x, (layer.rounded.float() * layer.scales).to(x.dtype), layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
