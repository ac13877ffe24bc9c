"""Layers with fewer kernels for generation: the norms, adapters and rotary positions of a model, swapped in for a while."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sft.model.structure import with_one_input


@contextlib.contextmanager
def fused_inference(model: Any) -> Iterator[None]:
    """Inside the block plain LoRA layers, RMS norms and, on a GPU, rotary positions of `model` compute what they did, up to
    rounding, in fewer kernels, and untrained adapters in none. Not for gradients.
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
        self.adapters = [_OneInput({m: kept[m] for m in members}) for members in with_one_input(model, kept)]
        for some in self.adapters:
            self.changed |= {module: functools.partial(some, module) for module in some.members}
            self.read += [some.read] if trained else []
        checked: dict[type, bool] = {}
        for module in model.modules():
            if forward := _fused_norm(module, checked):
                self.changed[module] = forward
        self.rotations = _plain_rotations(model) if model.device.type == "cuda" else {}

    def __enter__(self) -> None:
        for source, usual in self.rotations.items():
            source.apply_rotary_pos_emb = functools.partial(_rotate, usual)
        for read in self.read:
            read()
        self.set = [module for module in self.changed if "forward" not in vars(module)]  # else it is another's
        for module in self.set:
            module.forward = self.changed[module]

    def __exit__(self, *error: Any) -> None:
        for source, usual in self.rotations.items():
            source.apply_rotary_pos_emb = usual
        for module in self.set:
            del module.forward
        for some in self.adapters:
            some.forget()


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


class _OneInput:
    """Adapters of layers with one input. Their first products are one, and so are the second ones and the layers' own where
    these are FP8 layers side by side: a layer that comes with the same tensor as the one before finds it made.
    """

    def __init__(self, members: dict[Any, str]):
        """`members` are LoRA layers with the name of their adapter."""
        import torch

        from sft.model.fp8 import joined

        self.members, bases = members, [module.base_layer for module in members]
        ranks = _slices([len(module.lora_A[name].weight) for module, name in members.items()])
        outs = _slices([base.out_features for base in bases])
        like = {"dtype": bases[0].weight.dtype, "device": bases[0].weight.device}
        self.ranks, self.outs = dict(zip(members, ranks, strict=True)), dict(zip(members, outs, strict=True))
        self.down = torch.empty(ranks[-1].stop, bases[0].in_features, **like)
        self.joined = joined(bases)
        if self.joined:
            self.up = torch.zeros(ranks[-1].stop, outs[-1].stop, **like)
            self.ups = {module: self.up[self.ranks[module], self.outs[module]] for module in members}
        else:
            sizes = [(rank.stop - rank.start, base.out_features) for rank, base in zip(ranks, bases, strict=True)]
            self.ups = {module: torch.empty(size, **like) for module, size in zip(members, sizes, strict=True)}
        self.read()
        self.forget()

    def read(self) -> None:
        """Take the adapters' weights as they are now, to where they were."""
        for module, name in self.members.items():
            self.down[self.ranks[module]].copy_(module.lora_A[name].weight.detach())
            self.ups[module].copy_((module.lora_B[name].weight.detach() * module.scaling[name]).T)

    def forget(self) -> None:
        """Let go of the last input and what was made of it."""
        self.x = self.low = self.found = None

    def __call__(self, module: Any, x: Any) -> Any:
        """What one of the layers makes of `x` [..., columns]."""
        import torch

        if x is not self.x:
            self.x, self.waiting = x, len(self.members)
            self.low = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.down)
            self.found = self.joined(x, self.low, self.up) if self.joined else None
        if self.found is not None:
            found = self.found[:, self.outs[module]].view(*x.shape[:-1], -1)
        else:
            found = module.base_layer(x)  # of another type than the weights' under autocast
            found.view(-1, found.shape[-1]).addmm_(self.low[:, self.ranks[module]], self.ups[module].to(found.dtype))
        self.waiting -= 1
        if not self.waiting:  # nothing of one layer's waits beside the next one's
            self.forget()
        return found


def _slices(sizes: list[int]) -> list[slice]:
    """Where parts of these sizes lie, one behind the other."""
    return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


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


def _plain_rotations(model: Any) -> dict[Any, Callable[..., Any]]:
    """The files of transformers' models that attention of `model` is from, with their `apply_rotary_pos_emb`, where it computes
    what our kernel does: that is tried.
    """
    import torch

    from sft.model import kernels

    found = {}
    for source in {sys.modules[type(module).__module__] for module in model.modules() if hasattr(module, "q_proj")}:
        usual = getattr(source, "apply_rotary_pos_emb", None)
        if usual is None or isinstance(usual, functools.partial):  # within another block
            continue
        x = torch.linspace(-3, 2, 2 * 8 * 32, device=model.device).sin().view(2, 8, 1, 32)
        given = x[:, :4], x[:, 4:6], x[:, 6], x[:, 7]
        try:
            wanted = usual(*given)
        except TypeError:  # it is given something else
            continue
        if all(map(torch.allclose, wanted, kernels.rotate(*given))):
            found[source] = usual
    return found


def _rotate(usual: Callable[..., Any], q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
    """Queries and keys turned by their positions: those of one token a row, and whole, by our kernel."""
    from sft.model import kernels

    if args or kwargs or q.shape[2] != 1 or cos.shape[-1] != q.shape[-1] or not q.stride(-1) == k.stride(-1) == 1:
        return usual(q, k, cos, sin, *args, **kwargs)
    return kernels.rotate(q, k, cos, sin)
