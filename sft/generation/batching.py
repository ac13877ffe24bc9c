"""Prompts side by side: grouped by length, padded on the left, and cut at their end."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from sft.model.structure import base_of

PLACES = 8192
"""Tokens whose keys and values completions made together may take: one gibibyte of an 8B shape."""


@contextlib.contextmanager
def plain(model: Any) -> Iterator[None]:
    """A block in which `model.generate` takes nothing from the model's generation_config.json, whose values (a penalty for
    repetitions, say, with Qwen's chat models) fill in what a call leaves open: a greedy completion is the likeliest tokens.
    """
    from transformers import GenerationConfig

    base = base_of(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def grouped(prompts: list[list[int]], max_new_tokens: int, most: int) -> list[list[list[int]]]:
    """Prompts, token ids, in groups that are completed together: at most `most`, and PLACES keys and values in all."""
    groups: list[list[list[int]]] = []
    for prompt in prompts:
        group = [*groups[-1], prompt] if groups else [prompt]
        if groups and len(group) <= most and len(group) * (max(map(len, group)) + max_new_tokens) <= PLACES:
            groups[-1] = group
        else:
            groups.append([prompt])
    return groups


def padded(prompts: list[list[int]], pad: int, device: Any, length: int | None = None) -> tuple[Any, Any]:
    """(ids, mask) of prompts, [prompts, tokens], padded on the left to `length`, or to the longest."""
    import torch

    longest = length or max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def until_end(completion: list[int], stop_ids: Collection[int]) -> list[int]:
    """A completion up to its end mark and with it, if it has one."""
    return completion[: next((i + 1 for i, token in enumerate(completion) if token in stop_ids), len(completion))]
