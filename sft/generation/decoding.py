"""Completions of many prompts at once, greedy or drawn, whose steps of one token are captured as CUDA graphs.

A step of an 8B model launches some 2,500 kernels, for which a host takes 38 ms; an H100 reads its weights in 5. Keys and
values therefore have fixed places, and everything that changes from token to token, the choice of the next one among it, is
done by the captured kernels. Adapters, norms and attention take fewer kernels there: at one token a row, what a kernel costs by
itself is a good part of the time. Without a GPU the same steps are eager.

A prompt goes through the model once, however many completions it has. Completions that have ended leave the batch: the rows
that go on are moved together, and a step is captured for a few numbers of rows and of places. An adapter that is trained
between two calls needs no new capture.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft.generation import batching, sampling_noise
from sft.model import structure
from sft.model.fused_layers import FusedLayers

ATTENTION = "sft_one_token"
"""Name of `attend` among transformers' attention functions."""

ALIGNED = 16
"""Places of keys and values, a multiple of this: a mask of another width is copied to such a one in each layer."""

PLACES = 128
"""Places that a captured step attends to, a multiple of this: it reads all of them, filled or not."""

CHECK_EVERY = 16
"""Steps between two checks of which completions have ended; each check waits for a GPU."""

PREFILLED = 8192
"""Tokens of prompts, padding included, that go through the model at once."""


@dataclass
class Completion:
    """What a model says to a prompt."""

    ids: list[int]
    """Its tokens, the end mark included where it came."""
    log_probs: list[float]
    """Of each token, by the distribution that it was drawn from; empty if greedy."""
    ended: bool
    """Whether it ended by itself."""


@dataclass
class Drawing:
    """How tokens are drawn."""

    temperature: float
    keys: list[list[tuple[int, int]]]
    """Of each prompt, a key for each of its completions: a draw depends on that key and the token's place alone
    (sampling_noise.py)."""


def fits(model: Any) -> bool:
    """Whether the model's layers keep the keys and values of all tokens, and attend by PyTorch's own function."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config=config, max_cache_len=8).layers)


def greedy(
    model: Any, prompts: list[list[int]], stop_ids: set[int], max_new_tokens: int, check_stop: Callable[[], None]
) -> list[list[int]]:
    """The likeliest tokens after each prompt, at most `max_new_tokens`, the end mark included.

    `model` is a causal language model that `fits`, without an adapter around it. `check_stop` is called at every check and may
    raise. Call it without gradients.
    """
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    found = decoder.complete(prompts, stop_ids, max_new_tokens, check_stop)
    return [completion.ids for (completion,) in found]


class Decoder:
    """Completes prompts; what it has captured, and the memory for keys and values, serves the next call as well."""

    def __init__(self, model: Any, rows: int, places: int, trained: bool = False):
        """`rows` and `places` are the most completions at once, and the most tokens of a prompt with its completion. `model`
        is a causal language model that `fits`, without an adapter around it. `trained` says that its adapter changes between
        two calls.
        """
        from transformers import StaticCache

        self.model, self.rows, self.places = model, rows, -(-places // ALIGNED) * ALIGNED
        self.device, self.layers = model.device, FusedLayers(model, trained)
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=self.places)
        self.state: _State | None = None
        self.graphs: dict[tuple[int, int, float], Any] = {}
        self.pool = None

    def complete(
        self,
        prompts: list[list[int]],
        stop_ids: set[int],
        max_new_tokens: int,
        check_stop: Callable[[], None],
        drawing: Drawing | None = None,
    ) -> list[list[Completion]]:
        """The completions of each prompt: the likeliest tokens, or as many as `drawing` has keys for.

        They take as many rows, which have to be there. Call it without gradients.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        copies = [len(keys) for keys in drawing.keys] if drawing else [1] * len(prompts)
        with self.layers, without_cudnn(), structure.attention_of(self.model, ATTENTION):
            state = self._begin(prompts, copies, sorted(stop_ids), max_new_tokens, drawing)
            made = self._go_on(state, sum(copies), max_new_tokens, check_stop)
        ids = state.chosen[: sum(copies), :made].tolist()
        log_probs = state.log_probs[: sum(copies), :made].tolist() if drawing else None
        found, row = [], 0
        for count in copies:
            found.append([])
            for at in range(row, row + count):
                said = batching.until_end(ids[at], stop_ids)
                found[-1].append(
                    Completion(said, log_probs[at][: len(said)] if log_probs else [], bool(said) and said[-1] in stop_ids)
                )
            row += count
        return found

    # ------------------------------------------------------------------------------------------ from the prompts

    def _begin(
        self, prompts: list[list[int]], copies: list[int], stop_ids: list[int], limit: int, drawing: Drawing | None
    ) -> "_State":
        """Put the prompts through the model, each once, give its keys and values to all its rows, and choose their first
        token.
        """
        import torch

        rows, length = sum(copies), max(map(len, prompts))
        if rows > self.rows or length + limit > self.places:
            raise ValueError(f"{rows} rows of {length + limit} places; there are {self.rows} of {self.places}")
        state = self.state = self.state or _State.empty(self.rows, self.places, self.model.dtype, self.device)
        state.begin(stop_ids, length, limit, drawing, sampling_noise.tokens(self.model.config.get_text_config().vocab_size,
                                                                            self.device))  # fmt: skip
        row, at = 0, 0
        while at < len(prompts):
            count = max(1, min(len(prompts) - at, PREFILLED // length))
            part, times = prompts[at : at + count], torch.tensor(copies[at : at + count], device=self.device)
            logits = self._prefill(part, row, times, length)
            end = row + int(times.sum())
            positions = torch.tensor([len(prompt) for prompt in part], device=self.device)
            state.position[row:end, 0] = positions.repeat_interleave(times)
            places = torch.arange(self.places, device=self.device)
            seen = (places >= length - positions[:, None]) & (places < length)
            state.bias[row:end, 0, 0] = as_bias(seen, self.model.dtype).repeat_interleave(times, 0)
            state.choose(logits.repeat_interleave(times, 0), slice(row, end))
            row, at = end, at + count
        state.count.add_(1)
        return state

    def _prefill(self, prompts: list[list[int]], row: int, times: Any, length: int) -> Any:
        """The last logits of some prompts, [prompts, vocabulary]; the keys and values of each come to the next rows from `row`
        on, `times` many, where the last token of every prompt stands at the same place.
        """
        import torch

        ids, mask = batching.padded(prompts, 0, self.device, length)
        places, seen = torch.arange(length, device=self.device), mask.bool()[:, None, None]
        # A place of padding sees itself, since attention to nothing at all is not a number.
        whole = (seen & (places <= places[:, None])) | (places == places[:, None])

        def write(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not layer.is_initialized:
                layer.lazy_initialization(*(x[:1].expand(self.rows, -1, -1, -1) for x in (keys, values)))
            for kept, new in ((layer.keys, keys), (layer.values, values)):
                new = new.repeat_interleave(times, 0)
                kept[row : row + len(new), :, :length] = new
            return keys, values

        self._write_by(write)
        return self.model(
            input_ids=ids,
            attention_mask=as_bias(whole, self.model.dtype),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _write_by(self, write: Callable[..., Any]) -> None:
        """Have `write` take the place of each layer's `update`, which counts for itself where to write to: three kernels
        more."""
        for layer in self.cache.layers:
            layer.update = functools.partial(write, layer)

    # ------------------------------------------------------------------------------------------ token by token

    def _go_on(self, state: "_State", rows: int, limit: int, check_stop: Callable[[], None]) -> int:
        """Step until all rows have ended or are at the limit; how many tokens were made."""
        every, made = CHECK_EVERY if self.device.type == "cuda" else 1, 1
        state.rows.copy_(state.order)
        while made < limit:
            if (made - 1) % every == 0:
                check_stop()
                ended = state.ended[:rows].tolist()
                going = [row for row in range(rows) if not ended[row]]
                if not going:
                    break
                fewer = self._rows_for(len(going))
                if fewer < rows:
                    self._move([*going, *(row for row in range(rows) if ended[row])][:fewer], state.length + made)
                    rows = fewer
            self._step(rows, state.length + made)
            made += 1
        return made

    def _rows_for(self, rows: int) -> int:
        """Rows of a step with so many that go on; few numbers, since each is captured."""
        if self.device.type != "cuda":
            return rows
        fitting = 8
        while fitting < rows:
            fitting *= 2
        return fitting

    def _move(self, rows: list[int], places: int) -> None:
        """Make these rows the first ones; `places` of them are filled."""
        import torch

        take = torch.tensor(rows, device=self.device)
        self.state.move(take)
        for layer in self.cache.layers:
            for kept in (layer.keys, layer.values):
                kept[: len(rows), :, :places] = kept[:, :, :places].index_select(0, take)

    def _step(self, rows: int, places: int) -> None:
        """Make the next token of the first rows; their keys and values then take so many places and one more."""
        if self.device.type != "cuda":
            self._advance(rows, min(self.places, -(-(places + 1) // ALIGNED) * ALIGNED))
            return
        attended = min(self.places, -(-(places + 1) // PLACES) * PLACES)
        key = (rows, attended, self.state.temperature)
        if key not in self.graphs:
            # What libraries set up at their first call must not be captured. Capturing does not compute the step.
            self._advance(rows, attended)
            self.graphs[key] = _capture(functools.partial(self._advance, rows, attended), self.pool)
            self.pool = self.graphs[key].pool()
        else:
            self.graphs[key].replay()

    def _advance(self, rows: int, attended: int) -> None:
        state = self.state

        def write(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            kept = layer.keys[:rows, :, :attended], layer.values[:rows, :, :attended]
            for old, new in zip(kept, (keys, values), strict=True):
                old.index_copy_(2, state.at, new)
            return kept

        self._write_by(write)
        bias = state.bias[:rows, :, :, :attended]
        bias.index_fill_(3, state.at, 0.0)
        logits = self.model(
            input_ids=state.token[:rows],
            attention_mask=bias,
            position_ids=state.position[:rows],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        state.choose(logits, slice(0, rows))
        state.position[:rows].add_(1)
        state.at.add_(1)
        state.count.add_(1)


@dataclass
class _State:
    """The rows of a decoder. All tensors keep their place in the memory, where captured steps find them."""

    token: Any
    """[rows, 1]: the last token of each row, which the next step reads."""
    position: Any
    """[rows, 1]: its position."""
    bias: Any
    """[rows, 1, 1, places]: 0 where a row sees a place, and else minus infinity."""
    rows: Any
    """[rows]: which completion a row is."""
    order: Any
    ended: Any
    """[rows]: whether it has come to an end mark."""
    at: Any
    """[1]: the place that the next step writes to."""
    count: Any
    """[1]: tokens made so far."""
    chosen: Any
    """[completions, places]: the tokens made."""
    log_probs: Any
    """[completions, places]: their log probabilities, where they are drawn."""
    keys: Any
    """[rows, 2]: by which a row draws."""
    temperature: float = 0.0
    """0: the likeliest token is chosen."""
    length: int = 0
    """Places of the longest prompt."""
    stops: Any = None
    vocabulary: Any = None

    @classmethod
    def empty(cls, rows: int, places: int, dtype: Any, device: Any) -> "_State":
        import torch

        def zeros(*shape: int, dtype: Any = torch.long) -> Any:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            token=zeros(rows, 1), position=zeros(rows, 1), bias=zeros(rows, 1, 1, places, dtype=dtype), rows=zeros(rows),
            order=torch.arange(rows, device=device), ended=zeros(rows, dtype=torch.bool), at=zeros(1), count=zeros(1),
            chosen=zeros(rows, places), log_probs=zeros(rows, places, dtype=torch.float32),
            keys=zeros(rows, 2, dtype=torch.int32),
        )  # fmt: skip

    def begin(self, stop_ids: list[int], length: int, limit: int, drawing: Drawing | None, vocabulary: Any) -> None:
        """Forget what was, for prompts up to `length` and completions up to `limit` tokens."""
        import torch

        stops = torch.tensor(stop_ids, dtype=torch.long, device=self.token.device)
        if self.stops is None:
            self.stops, self.vocabulary = stops, vocabulary
        self.stops.copy_(stops)
        self.chosen[:, :limit].zero_()
        self.count.zero_()
        self.ended.zero_()
        self.at.fill_(length)
        self.rows.copy_(self.order)
        self.length, self.temperature = length, drawing.temperature if drawing else 0.0
        if drawing:
            keys = [key for some in drawing.keys for key in some]
            self.keys[: len(keys)] = torch.tensor(keys, dtype=torch.int32).to(self.keys.device)

    def choose(self, logits: Any, rows: slice) -> None:
        """Choose the next token of some rows by their logits, [rows, vocabulary]."""
        import torch

        completions = self.rows[rows]
        if self.temperature:
            logits = logits.float() / self.temperature
            noise = sampling_noise.gumbel(self.keys[rows], self.count, self.vocabulary)
            token = noise.add_(logits).argmax(-1)
            log_probs = logits.gather(1, token[:, None])[:, 0] - torch.logsumexp(logits, -1)
            self.log_probs[completions, self.count] = log_probs
        else:
            token = logits.argmax(-1)
        self.token[rows, 0] = token
        self.chosen[completions, self.count] = token
        self.ended[rows] |= torch.isin(token, self.stops)

    def move(self, take: Any) -> None:
        """Make the rows that `take` names the first ones."""
        for kept in (self.token, self.position, self.bias, self.rows, self.ended, self.keys):
            kept[: len(take)] = kept.index_select(0, take)


def as_bias(seen: Any, dtype: Any) -> Any:
    """What attention adds where a place is seen, 0, and where not; of a bool each layer would make that anew."""
    import torch

    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _capture(step: Callable[[], None], pool: Any = None) -> Any:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
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
