"""The parts of a loaded model: its base, decoder layers, attention and parameters."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any


def base_of(model: Any) -> Any:
    """The causal language model under an adapter, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_parameters(model: Any) -> dict[str, int]:
    """All parameters and the trained ones; a 4-bit weight counts as the values it packs."""
    total = trained = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        count = parameter.numel() * (2 * parameter.element_size() if packed else 1)
        total += count
        trained += parameter.numel() if parameter.requires_grad else 0
    return {"parameters": total, "trainable_parameters": trained}


def rounding_of(model: Any) -> dict[str, Any]:
    """What run.json keeps of a base that was rounded to FP8."""
    facts = getattr(base_of(model), "rounding", None)
    return {"fp8": facts} if facts else {}


class attention_of:
    """Inside the block a model attends by the function registered as `name`; outside by its own, which generation needs."""

    def __init__(self, model: Any, name: str):
        self.config, self.name = model.config.get_text_config(), name

    def __enter__(self) -> None:
        self.before, self.config._attn_implementation = self.config._attn_implementation, self.name

    def __exit__(self, *error: Any) -> None:
        self.config._attn_implementation = self.before


@contextlib.contextmanager
def short_walks(model: Any) -> Iterator[None]:
    """Inside the block the model's `train` and `zero_grad`, which transformers calls at every step, do not walk through its
    thousands of modules: a mode that is set already stays, and gradients of trained weights alone are cleared.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()  # all of it: a loaded model is in evaluation mode, and an adapter that was put on it just now is not

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for weight in trained:
            weight.grad = None

    model.train, model.zero_grad = train, zero_grad
    try:
        yield
    finally:
        del model.train, model.zero_grad


ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that are given the same tensor, by the names that transformers' models have for them."""


def with_one_input(model: Any, layers: Iterable[Any]) -> list[list[Any]]:
    """Those of `layers` that have one input together, each of the others by itself."""
    left, found = dict.fromkeys(layers), []
    for parent in model.modules():
        for names in ONE_INPUT:
            members = [getattr(parent, name, None) for name in names]
            members = [module for module in members if module in left]
            if len({module.in_features for module in members}) == 1:
                found.append(members)
                for module in members:
                    del left[module]
    return found + [[module] for module in left]


def decoder_layers(base: Any) -> list[Any]:
    """The layers of a transformers model that repeat, of its text part where it has others for images and sound."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
