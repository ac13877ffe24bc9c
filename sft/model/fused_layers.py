"""Layers with fewer kernels for generation: the norms and adapters of a model, swapped in for a while."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that are given the same tensor, by the names that transformers' models have for them."""


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
        moved = [module.lora_B[name].weight.any() for module, name in adapters.items()]
        moved = torch.stack(moved).tolist() if moved else []  # one wait for the GPU, not one for each
        kept = {module: name for (module, name), has_moved in zip(adapters.items(), moved, strict=True) if trained or has_moved}
        self.changed |= {module: module.base_layer.__call__ for module in adapters if module not in kept}
        self.downs = [_Downs(members) for members in _with_one_input(model, kept)]
        for downs in self.downs:
            for module in downs.members:
                self.changed[module], read = _fused_adapter(module, kept[module], downs)
                self.read += [read] if trained else []
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
        for downs in self.downs:
            downs.forget()


def _plain_adapter(module: Any) -> str | None:
    """The name of the one active adapter of a plain LoRA layer around a plain linear one."""
    import torch
    from peft.tuners.lora.layer import Linear

    from sft.model.fp8 import Fp8Linear

    if type(module) is not Linear or type(module.base_layer) not in (torch.nn.Linear, Fp8Linear):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or names[0] in module.lora_variant or module.merged or module.disable_adapters:
        return None
    return names[0] if module.lora_B[names[0]].bias is None else None


class _Downs:
    """The first product of the adapters of layers with one input, as one product: a layer that comes with the same tensor as
    the one before finds it made."""

    def __init__(self, members: dict[Any, str]):
        """`members` are LoRA layers with the name of their adapter."""
        import torch

        self.members = members
        weights = [module.lora_A[name].weight.detach().to(module.base_layer.weight.dtype) for module, name in members.items()]
        ends = list(itertools.accumulate(len(weight) for weight in weights))
        self.places = dict(zip(members, itertools.pairwise([0, *ends]), strict=True))
        self.weight = torch.cat(weights)
        self.forget()

    def forget(self) -> None:
        """Let go of the last input and its product."""
        self.x = self.found = None

    def weight_of(self, module: Any) -> Any:
        """The part that is the module's, in place."""
        return self.weight[slice(*self.places[module])]

    def __call__(self, module: Any, x: Any) -> Any:
        import torch

        if x is not self.x:
            self.x, self.found = x, torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        return self.found[:, slice(*self.places[module])]


def _with_one_input(model: Any, adapters: dict[Any, str]) -> list[dict[Any, str]]:
    """The adapters, those that have one input together."""
    left, found = dict(adapters), []
    for parent in model.modules():
        for names in ONE_INPUT:
            members = [getattr(parent, name, None) for name in names]
            members = [module for module in members if module in left]
            if len({module.in_features for module in members}) == 1:
                found.append({module: left.pop(module) for module in members})
    return found + [{module: name} for module, name in left.items()]


def _fused_adapter(module: Any, name: str, downs: _Downs) -> tuple[Callable[..., Any], Callable[[], None]]:
    """(the forward pass of a plain LoRA layer: three matrix products, the last one added in place; what reads its weights
    again).
    """
    base, down = module.base_layer, downs.weight_of(module)
    up = (module.lora_B[name].weight.detach() * module.scaling[name]).to(base.weight.dtype).T

    def read() -> None:
        down.copy_(module.lora_A[name].weight.detach())
        up.copy_((module.lora_B[name].weight.detach() * module.scaling[name]).T)

    def forward(x: Any) -> Any:
        low = downs(module, x)
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
