"""Layers with fewer kernels for generation: the norms and adapters of a model, swapped in for a while."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def fused_inference(model: Any) -> Iterator[None]:
    """Inside the block plain LoRA layers and RMS norms of `model` compute what they did, up to rounding, in fewer kernels, and
    untrained adapters in none. Not for gradients.
    """
    with FusedLayers(model):
        yield


class FusedLayers:
    """A block as `fused_inference` is, which can be entered again. An adapter that is `trained` in between is read anew then,
    to where captured kernels find it.
    """

    def __init__(self, model: Any, trained: bool = False):
        import torch

        self.changed: dict[Any, Callable[..., Any]] = {}
        self.read: list[Callable[[], None]] = []
        adapters = {module: name for module in model.modules() if (name := _plain_adapter(module))}
        learnt = [module.lora_B[name].weight.any() for module, name in adapters.items()]
        learnt = torch.stack(learnt).tolist() if learnt else []  # one wait for the GPU, not one for each
        for (module, name), has_learnt in zip(adapters.items(), learnt, strict=True):
            if trained or has_learnt:
                self.changed[module], read = _fused_adapter(module, name)
                self.read += [read] if trained else []
            else:
                self.changed[module] = module.base_layer.__call__
        checked: dict[type, bool] = {}
        for module in model.modules():
            if forward := _fused_norm(module, checked):
                self.changed[module] = forward

    def __enter__(self) -> None:
        for read in self.read:
            read()
        self.set = [module for module in self.changed if "forward" not in vars(module)]  # else it is another's
        for module in self.set:
            module.forward = self.changed[module]

    def __exit__(self, *error: Any) -> None:
        for module in self.set:
            del module.forward


def _plain_adapter(module: Any) -> str | None:
    """The name of the one active adapter of a plain LoRA layer around a plain linear one."""
    import torch
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or names[0] in module.lora_variant or module.merged or module.disable_adapters:
        return None
    return names[0] if module.lora_B[names[0]].bias is None else None


def _fused_adapter(module: Any, name: str) -> tuple[Callable[..., Any], Callable[[], None]]:
    """(the forward pass of a plain LoRA layer: three matrix products, the last one added in place; what reads its weights
    again).
    """
    import torch

    base = module.base_layer
    down = module.lora_A[name].weight.detach().to(base.weight.dtype, copy=True)
    up = (module.lora_B[name].weight.detach() * module.scaling[name]).to(base.weight.dtype).T

    def read() -> None:
        down.copy_(module.lora_A[name].weight.detach())
        up.copy_((module.lora_B[name].weight.detach() * module.scaling[name]).T)

    def forward(x: Any) -> Any:
        low = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), down)
        found = base(x)  # of another type than the weights' under autocast
        found.view(-1, found.shape[-1]).addmm_(low, up.to(found.dtype))
        return found

    return forward, read


def _fused_norm(module: Any, checked: dict[type, bool]) -> Callable[..., Any] | None:
    """PyTorch's own RMS norm in place of one written out, if it computes the same, which is tried once for a class."""
    import torch

    kind = type(module)
    if not kind.__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    weight, epsilon = module.weight, module.variance_epsilon

    def forward(x: Any) -> Any:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)

    if kind not in checked:
        x = torch.linspace(-3, 2, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
        checked[kind] = torch.allclose(forward(x), module(x), rtol=2e-2, atol=1e-4)
    return forward if checked[kind] else None
