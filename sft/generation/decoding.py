"""Greedy completions of several prompts at once, whose steps of one token are captured as a CUDA graph.

A step of an 8B model launches some 2,500 kernels, for which a host takes 38 ms; an H100 reads its weights
in 5. Keys and values therefore get a place of fixed size (transformers' StaticCache), and everything that changes from token
to token, the choice of the next one among it, is done by the captured kernels. Without a GPU the same steps are eager.
Adapters, norms and attention take fewer kernels there: at one token a row, what a kernel costs by itself is a good part of the
time.
"""

import functools
from collections.abc import Callable
from typing import Any

from sft.model import structure
from sft.model.fused_layers import fused_inference

EAGER = 1
"""Eager steps before one is captured: what libraries set up at their first call must not be."""

ATTENTION = "sft_one_token"
"""Name of `attend` among transformers' attention functions."""

ALIGNED = 16
"""Places of keys and values, a multiple of this: a mask of another width is copied to such a one in each layer."""

CHECK_EVERY = 16
"""Steps between two checks whether all completions have ended; each check waits for a GPU."""


def fits(model: Any) -> bool:
    """Whether the model's layers keep the keys and values of all tokens, and attend by PyTorch's own function."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config=config, max_cache_len=8).layers)


def greedy(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    stop_ids: set[int],
    max_new_tokens: int,
    check_stop: Callable[[], None],
) -> list[list[int]]:
    """The likeliest tokens after each prompt, at most `max_new_tokens`; a completion may go on after its end mark.

    input_ids, attention_mask: [prompts, tokens], padded on the left; `model` is a causal language model that `fits`, without an
    adapter around it. `check_stop` is called at every check and may raise. Call it without gradients.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    with fused_inference(model), without_cudnn(), structure.attention_of(model, ATTENTION):
        return _greedy(model, input_ids, attention_mask, stop_ids, max_new_tokens, check_stop)


def _greedy(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    stop_ids: set[int],
    max_new_tokens: int,
    check_stop: Callable[[], None],
) -> list[list[int]]:
    """Do the first steps, capture one on a GPU, and replay it for the rest; in a model as `greedy` changes it."""
    import torch
    from transformers import StaticCache

    prompts, length = input_ids.shape
    device, last = input_ids.device, -(-(length + max_new_tokens) // ALIGNED) * ALIGNED
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=last)
    seen = torch.zeros(prompts, 1, 1, last, dtype=torch.bool, device=device)
    seen[:, 0, 0, :length] = attention_mask.bool()
    places = torch.arange(last, device=device)
    # A place of padding sees itself, since attention to nothing at all is not a number.
    whole = (seen & (places <= places[:length, None])) | (places == places[:length, None])
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    at = places[:length]

    def write(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """In place of the layer's `update`, which counts for itself where to write to: three kernels more."""
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        return layer.keys.index_copy_(2, at, keys), layer.values.index_copy_(2, at, values)

    for layer in cache.layers:
        layer.update = functools.partial(write, layer)
    found = model(
        input_ids=input_ids,
        attention_mask=_as_bias(whole, model.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    token, position = found.logits[:, -1].argmax(-1, keepdim=True), positions[:, -1:] + 1
    at = torch.tensor([length], device=device)
    chosen = torch.zeros(prompts, last, dtype=torch.long, device=device)
    chosen.index_copy_(1, at, token)
    bias = _as_bias(seen, model.dtype)

    def step() -> None:
        bias.index_fill_(3, at, 0.0)
        logits = model(
            input_ids=token, attention_mask=bias, position_ids=position, past_key_values=cache, use_cache=True
        ).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)
        at.add_(1)
        chosen.index_copy_(1, at, token)

    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    count, graph, every = 1, None, CHECK_EVERY if device.type == "cuda" else 1

    def go_on(advance: Callable[[], None], until: int) -> None:
        nonlocal count
        while count < until:
            if (count - 1) % every == 0:
                check_stop()
                if torch.isin(chosen[:, length : length + count], stops).any(1).all():
                    return
            advance()
            count += 1

    if device.type == "cuda":
        go_on(step, min(1 + EAGER, max_new_tokens))
        if EAGER < count < max_new_tokens:
            graph = _capture(step)
    go_on(graph.replay if graph else step, max_new_tokens)
    return chosen[:, length : length + max_new_tokens].tolist()


def _as_bias(seen: Any, dtype: Any) -> Any:
    """What attention adds where a place is seen, 0, and where not; of a bool each layer would make that anew."""
    import torch

    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _capture(step: Callable[[], None]) -> Any:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


def attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Any, None]:
    """Attention of one token a row, whose heads that share keys and values are the queries of one head: nothing is repeated for
    them. Of more tokens, as transformers does it.

    query: [rows, heads, tokens, width]; key, value: [rows, shared heads, places, width]; gives [rows, tokens, heads, width].
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, tokens, width = query.shape
    if tokens > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


def without_cudnn() -> Any:
    """A block in which attention with a mask is not cuDNN's, which plans anew for each length: the
    first completions took twice as long with it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
