"""Tokens drawn by counters: a draw depends on the seed, the rollout, the prompt, the completion and the place of the token, not
on what else is in the batch, on the number of processes, or on where a run was resumed.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

Key = tuple[int, int]
"""What the draws of one completion come from: two 32-bit numbers."""


@dataclass
class Drawing:
    """How tokens are drawn."""

    temperature: float
    keys: list[list[Key]]
    """Of each prompt, a key for each of its completions."""


def key_of(*counters: int) -> Key:
    """The key of the completion that these counters name."""
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def draw(logits: Any, keys: Any, place: Any) -> tuple[Any, Any]:
    """(tokens, their log probabilities), [rows], of logits [rows, vocabulary] in float32: the token at which the sum of the
    probabilities exceeds a number between 0 and 1. keys: int64 [rows, 2]; place: [1], how many tokens come before.
    """
    import torch

    log_probs = torch.log_softmax(logits, -1)
    summed = log_probs.double().exp_().cumsum_(-1)
    wanted = uniform(keys, place)[:, None] * summed[:, -1:]  # whose last one is 1 but for rounding
    token = torch.searchsorted(summed, wanted, right=True).clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], log_probs.gather(1, token)[:, 0]


def uniform(keys: Any, place: Any) -> Any:
    """A number of each row that is at least 0 and below 1, float64 [rows], as a hash of its key and the place."""
    return _mixed(_mixed(keys[:, 0] ^ place) ^ keys[:, 1]).double() * 2.0**-32


def _mixed(x: Any) -> Any:
    """A hash of 32-bit numbers, held as int64: lowbias32 of Chris Wellons' hash prospector."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
