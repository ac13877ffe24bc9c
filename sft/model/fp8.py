"""Frozen layers in FP8: e4m3 weights and inputs, multiplied at twice the rate of bfloat16.

Under LoRA the base never changes, so its weights are rounded once, when the model is loaded; what they are multiplied with is
rounded in each product. Each row of either, the values of one token or those of one output, has a scale of its own in float32
("rowwise" in torch). Gradients of the inputs are products with the very same rounded weights. The weights get no gradient, and
adapters, norms, embeddings and the output layer stay as they are.

Needs `torch._scaled_mm`: compute capability 8.9 or higher, or a CPU, where it is slow (`is_supported`).
To be imported where there are such layers: it imports torch, whose compiler does not follow a class made in a function.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear

from sft.model.structure import decoder_layers, with_one_input

LARGEST = 448.0
"""The largest number of e4m3."""

LEAST = 1e-12
"""A row whose values are all smaller, as one of zeros, has the scale of this."""

MULTIPLE = 16
"""What both sizes of a weight have to be a multiple of (cuBLAS)."""


class Fp8Linear(torch.nn.Linear):
    """A frozen layer whose `weight` holds nothing but NaN, so that nobody computes with it unseen: it keeps the shape, the type
    and the device that PEFT asks for, in two bytes.
    """

    def forward(self, x: Any) -> Any:
        x = _in_autocast_type(x)
        rows = x.reshape(-1, self.in_features)
        out = Product.apply(rows, self.rounded, self.scales, self.transposed)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Product(torch.autograd.Function):
    """`x` [tokens, columns] times the transposed weight [rows, columns], which is `rounded` times `scales` [rows, 1].

    Both sides of a product in FP8 need their common index last. The gradient of `x` therefore takes `transposed`, which is
    `rounded.T` in memory of its own, or makes it (None). `scales` belong to that index there: they go to the other side, before
    it is rounded.
    """

    @staticmethod
    def forward(ctx, x, rounded, scales, transposed):
        ctx.save_for_backward(rounded, scales, transposed)
        return multiply(x, rounded, scales)

    @staticmethod
    def backward(ctx, grad):
        rounded, scales, transposed = ctx.saved_tensors
        transposed = rounded.T.contiguous() if transposed is None else transposed
        return multiply(grad.float() * scales.T, transposed, scales.new_ones(len(transposed), 1), grad.dtype), None, None, None


def _in_autocast_type(x: Any) -> Any:
    """`x` in the type that is computed in."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def multiply(x: Any, rounded: Any, scales: Any, dtype: Any = None, low: Any = None, up: Any = None) -> Any:
    """`x` [tokens, columns], rounded row by row, times the transposed weight [rows, columns], in `dtype` or the type of `x`;
    plus `low` [tokens, rank] @ `up` [rank, rows], what an adapter adds, where they are given.
    """
    values, of_rows = round_rows(x)
    if x.is_cuda and not torch.compiler.is_compiling():
        from sft.model import kernels

        if len(x) <= kernels.FEW and (low is None or low.shape[1] <= kernels.FEW):
            return kernels.multiply(values, of_rows, rounded, scales, dtype or x.dtype, low, up)
    # torch's compiler knows this one and not yet the public torch.nn.functional.scaled_mm.
    out = torch._scaled_mm(values, rounded.T, of_rows, scales.T, out_dtype=dtype or x.dtype, use_fast_accum=True)
    return out if low is None else out.addmm_(low, up)


def round_rows(x: Any) -> tuple[Any, Any]:
    """(`x` [rows, columns] in e4m3, scales [rows, 1] in float32 by which it is to be multiplied): the largest value of each
    row becomes the largest number there is.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        from sft.model import kernels

        return kernels.round_rows(x.contiguous(), LARGEST, LEAST)
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=LEAST) / LARGEST
    return (x.float() / scales).to(torch.float8_e4m3fn).contiguous(), scales


def is_supported(device: Any, dtype: Any) -> bool:
    """Whether the device can multiply such weights, in a model that computes in `dtype`. A CPU can, some twenty times more
    slowly than in float32, which it computes in unless it is told otherwise.
    """
    on_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return dtype == torch.bfloat16 and (on_gpu or device.type == "cpu")


def round_layers(base: Any, keep_transposed: bool = False) -> tuple[int, int]:
    """Round the linear layers in the decoder layers of `base`; how many are, and how many could not be. One at a time, so
    that no second copy of the model is needed. With `keep_transposed` the weights are there transposed as well, which else the
    backward pass does anew each time: a byte more a weight, and the same numbers.
    """
    found = {m: None for layer in decoder_layers(base) for m in layer.modules() if type(m) is torch.nn.Linear}
    fitting = [m for m in found if not any(size % MULTIPLE for size in m.weight.shape)]
    for layers in with_one_input(base, fitting):
        parts = [round_rows(layer.weight.data) for layer in layers]
        together = tuple(torch.cat(some) if len(layers) > 1 else some[0] for some in zip(*parts, strict=True))
        ends = itertools.accumulate((layer.out_features for layer in layers), initial=0)
        for layer, (begin, end) in zip(layers, itertools.pairwise(ends), strict=True):
            layer.together, (layer.rounded, layer.scales) = together, (part[begin:end] for part in together)
            layer.transposed = layer.rounded.T.contiguous() if keep_transposed else None
            empty = layer.weight.new_full((1, 1), float("nan")).expand(layer.weight.shape)
            layer.weight = torch.nn.Parameter(empty, requires_grad=False)
            layer.__class__ = Fp8Linear
    return len(fitting), len(found) - len(fitting)


def joined(layers: list[Any]) -> Callable[[Any, Any, Any], Any] | None:
    """What makes the outputs of some layers, [tokens, their rows one behind the other], of their one input and of what an
    adapter adds (`multiply`), as one product; None where they are not FP8 layers that lie so in the memory. Not for gradients.
    """
    first = layers[0]
    if any(type(layer) is not Fp8Linear or layer.together is not first.together or layer.bias is not None for layer in layers):
        return None
    if sum(layer.out_features for layer in layers) != len(first.together[0]):
        return None

    def product(x: Any, low: Any, up: Any) -> Any:
        x = _in_autocast_type(x).reshape(-1, x.shape[-1])
        return multiply(x, *first.together, low=low.to(x.dtype), up=up.to(x.dtype))

    return product


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
