"""Decoder layers compiled by torch, with the kernels kept on the disk."""

import functools
import os
from typing import Any

from sft.model.structure import decoder_layers
from sft.storage.cache import cache_dir


def keep_kernels() -> None:
    """What is compiled stays on the disk."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))


def compile_layers(base: Any) -> None:
    """Compile each decoder layer at its first use, once for all layers of a kind, numbers of tokens and ranks of an adapter."""
    import torch

    keep_kernels()
    torch._dynamo.config.specialize_float = True  # else each layer's constants are computed on the CPU, in C++ to be compiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # Else a layer is cut in pieces where several processes average gradients, which here happens after the whole backward pass.
    torch._dynamo.config.optimize_ddp = False
    _settle_shapes(base)
    base.enable_input_require_grads()  # else the first layer, whose input needs no gradient, is another kind
    for layer in decoder_layers(base):
        layer.compile(dynamic=True)


def _settle_shapes(base: Any) -> None:
    """Let the rank be a variable of what is compiled, which else is compiled anew for each: 15 s in a sweep over ranks of
    an 8B shape. All other sizes of a layer's tensors are constants, as they are without this.

    An adapter's scale, a number that would be compiled in, becomes a tensor where 16 bits hold it exactly, as they do a ratio
    of powers of two.
    """
    import torch

    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    for name, module in ((name, module) for layer in decoder_layers(base) for name, module in layer.named_modules()):
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in (x for x in held if isinstance(x, torch.Tensor)):
            if ".lora_A." in name:
                torch._dynamo.mark_static(tensor, 1)
            elif ".lora_B." in name:
                torch._dynamo.mark_static(tensor, 0)
            else:
                torch._dynamo.mark_static(tensor)
        scaling = getattr(module, "scaling", None)  # attention has one too, a number
        for key, scale in scaling.items() if isinstance(scaling, dict) else ():
            if float(torch.tensor(scale, dtype=torch.bfloat16)) == scale:
                module.scaling[key] = _as_tensor(scale, base.device)


@functools.cache
def _as_tensor(scale: float, device: Any) -> Any:
    """A number on the device, the same one as long as the process lives: a captured step reads it where it is."""
    import torch

    return torch.tensor(scale, device=device)
