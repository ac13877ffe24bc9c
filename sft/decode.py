"""Greedy answers to several prompts at once, whose steps of one token are recorded as a CUDA graph.

A step of an 8B model launches some 2,500 kernels, for which a host takes 38 ms (H100, 2026-11-27); an H100 reads its weights
in 5. Keys and values therefore get a place of fixed size (transformers' StaticCache), and everything that changes from token
to token, the choice of the next one among it, is done by the recorded kernels. Without a GPU the same steps are launched.
"""

from collections.abc import Callable
from typing import Any

LAUNCHED = 2
"""Steps that are launched before one is recorded: what libraries set up at their first call must not be."""
LOOK = 16
"""Steps after which it is looked whether all answers have ended; each look waits for the GPU."""


def fits(model: Any) -> bool:
    """Whether the model's layers keep the keys and values of all tokens, and attend by PyTorch's own function."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config=config, max_cache_len=8).layers)


def greedy(
    model: Any, input_ids: Any, attention_mask: Any, stop_ids: set[int], max_new_tokens: int, check_stop: Callable[[], None]
) -> list[list[int]]:
    """The likeliest tokens after each prompt, at most `max_new_tokens`; an answer may go on after its end mark.

    input_ids, attention_mask: [prompts, tokens], padded on the left; `model` is a causal language model that `fits`, without an
    adapter around it. `check_stop` is called at every look and may raise. Call it without gradients.
    """
    import torch
    from transformers import StaticCache

    prompts, length = input_ids.shape
    device, last = input_ids.device, length + max_new_tokens
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=last)
    seen = torch.zeros(prompts, 1, 1, last, dtype=torch.bool, device=device)
    seen[:, 0, 0, :length] = attention_mask.bool()
    places = torch.arange(last, device=device)
    # A place of padding sees itself, since attention to nothing at all is not a number.
    whole = (seen & (places <= places[:length, None])) | (places == places[:length, None])
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    found = model(
        input_ids=input_ids,
        attention_mask=whole,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    token, position = found.logits[:, -1].argmax(-1, keepdim=True), positions[:, -1:] + 1
    at = torch.tensor([length], device=device)
    chosen = torch.zeros(prompts, last, dtype=torch.long, device=device)
    chosen.index_copy_(1, at, token)

    def step() -> None:
        seen.index_fill_(3, at, True)
        logits = model(
            input_ids=token, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True
        ).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)
        at.add_(1)
        chosen.index_copy_(1, at, token)

    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    graph = None
    for count in range(1, max_new_tokens):
        if count % LOOK == 1:
            check_stop()
            if torch.isin(chosen[:, length : length + count], stops).any(1).all():
                break
        if device.type == "cuda" and count > LAUNCHED:
            graph = graph or _record(step)
            graph.replay()
        else:
            step()
    return chosen[:, length:].tolist()


def _record(step: Callable[[], None]) -> Any:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph
