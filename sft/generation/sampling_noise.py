"""Noise to draw tokens by, from counters: a draw depends on the seed, the step, the prompt, the completion and the place of the
token alone, not on what else is in the batch, on the number of processes, or on where a run was resumed.

The token with the largest sum of log probability and Gumbel noise is a draw from the distribution (the Gumbel-max trick; arXiv
1611.01144, section 2). The noise of a token is a hash of the completion's key, the place and the token's id.
"""

import hashlib
from typing import Any


def key_of(*counters: int) -> tuple[int, int]:
    """Two 32-bit numbers, signed, for a completion that these counters name."""
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def tokens(vocabulary: int, device: Any) -> Any:
    """The hash of each token id, int32 [vocabulary]: what `gumbel` begins with."""
    import torch

    return _mixed(torch.arange(vocabulary, dtype=torch.int32, device=device))


def gumbel(keys: Any, place: Any, tokens: Any) -> Any:
    """Gumbel noise of each row and token, float32 [rows, vocabulary].

    keys: int32 [rows, 2], those of each row's completion; place: [1], the token's place in it; tokens: `tokens()`.
    """
    row = _mixed(_mixed(keys[:, :1] ^ place.int()) ^ keys[:, 1:])
    bits = _mixed(row ^ tokens)
    # Large noise comes from small numbers, which float32 holds finely.
    share = (bits.bitwise_and_(0x7FFFFFFF).float() + 0.5).mul_(2.0**-31)
    return share.neg_().log1p_().neg_().log_().neg_()


def _mixed(x: Any) -> Any:
    """A hash of 32-bit numbers, as int32: lowbias32 of Chris Wellons' hash prospector, whose products wrap around."""
    x = x ^ _shifted(x, 16)
    x = x * 0x7FEB352D
    x ^= _shifted(x, 15)
    x *= 0x846CA68B - 2**32
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Any, by: int) -> Any:
    """`x` shifted to the right as a number without a sign."""
    return (x >> by) & (2 ** (32 - by) - 1)
