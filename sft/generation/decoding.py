"""Completions of many prompts at once, greedy or drawn, whose steps of one token are captured as CUDA graphs.

A step of an 8B model launches some 2,500 kernels, for which a host takes 38 ms; an H100 reads its weights in 5. Keys and
values therefore have fixed places, and everything that changes from token to token, the choice of the next one among it, is
done by the captured kernels. Adapters, norms and attention take fewer kernels there: at one token a row, what a kernel costs by
itself is a good part of the time. Without a GPU the same steps are eager.

A prompt goes through the model once, however many completions it has. Completions that have ended leave the batch: the rows
that go on are moved together, and a step is captured for a few numbers of rows. An adapter that is trained
between two calls needs no new capture.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft.generation import batching
from sft.generation.drawing import Drawing, draw
from sft.model import structure
from sft.model.fused_layers import FusedLayers

ATTENTION = "sft_one_token"
"""Name of `attend` among transformers' attention functions."""

ALIGNED = 16
"""Places of keys and values, a multiple of this: a mask of another width is copied to such a one in each layer."""

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
        self.device, self.layers, self.flash = model.device, FusedLayers(model, trained), _has_flash(model)
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=self.places)
        self.state = _State.empty(rows, self.places, self.device)
        self.in_prompts = True
        self.graphs: dict[tuple[int, float], Any] = {}
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

        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, self._attend)
        copies = [len(keys) for keys in drawing.keys] if drawing else [1] * len(prompts)
        with self.layers, without_cudnn(), structure.attention_of(self.model, ATTENTION):
            self._begin(prompts, copies, sorted(stop_ids), max_new_tokens, drawing)
            made = self._go_on(sum(copies), max(map(len, prompts)), max_new_tokens, check_stop)
        state = self.state
        ids = state.chosen[: sum(copies), :made].tolist()
        log_probs = state.log_probs[: sum(copies), :made].tolist() if drawing else None
        found, row = [], 0
        for count in copies:
            found.append([])
            for at in range(row, row + count):
                kept = batching.until_end(ids[at], stop_ids)
                ended = bool(kept) and kept[-1] in stop_ids
                found[-1].append(Completion(kept, log_probs[at][: len(kept)] if log_probs else [], ended))
            row += count
        return found

    # ------------------------------------------------------------------------------------------ from the prompts

    def _begin(
        self, prompts: list[list[int]], copies: list[int], stop_ids: list[int], limit: int, drawing: Drawing | None
    ) -> None:
        """Put the prompts through the model, each once, give its keys and values to all its rows, and choose their first
        token.
        """
        import torch

        rows, longest, state = sum(copies), max(map(len, prompts)), self.state
        if rows > self.rows or longest + limit > self.places:
            raise ValueError(f"{rows} rows of {longest + limit} places; there are {self.rows} of {self.places}")
        state.begin(stop_ids, limit, drawing)
        row, at, self.in_prompts = 0, 0, True
        while at < len(prompts):
            count = max(1, min(len(prompts) - at, PREFILLED // longest))
            part, times = prompts[at : at + count], torch.tensor(copies[at : at + count], device=self.device)
            logits = self._prefill(part, row, times)
            end = row + sum(copies[at : at + count])
            state.filled[row:end] = torch.tensor([len(prompt) for prompt in part], device=self.device).repeat_interleave(times)
            state.choose(logits.repeat_interleave(times, 0), slice(row, end))
            row, at = end, at + count
        state.count.add_(1)

    def _prefill(self, prompts: list[list[int]], row: int, times: Any) -> Any:
        """The last logits of some prompts, [prompts, vocabulary]; the keys and values of each come to the next rows from `row`
        on, `times` many.
        """
        import torch

        ids, mask = batching.padded(prompts, 0, self.device)
        length = ids.shape[1]
        places, seen = torch.arange(length, device=self.device), mask.bool()[:, None, None]
        # A place of padding sees itself, since attention to nothing at all is not a number.
        whole = (seen & (places <= places[:, None])) | (places == places[:, None])
        padding = length - mask.sum(-1, keepdim=True)
        unpadded = (places + padding).clamp(max=length - 1)[:, :, None, None]  # rows begin at their first place

        def write(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not layer.is_initialized:
                layer.keys, layer.values = (x.new_zeros(self.rows, self.places, x.shape[1], x.shape[3]) for x in (keys, values))
                layer.is_initialized = True
            for kept, new in ((layer.keys, keys), (layer.values, values)):
                new = torch.take_along_dim(new.transpose(1, 2), unpadded, 1).repeat_interleave(times, 0)
                kept[row : row + len(new), :length] = new
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

    def _go_on(self, rows: int, longest: int, limit: int, check_stop: Callable[[], None]) -> int:
        """Step until all rows have ended or are at the limit; how many tokens were made. `longest` is the longest prompt's
        length.
        """
        every, made, state, self.in_prompts = CHECK_EVERY if self.device.type == "cuda" else 1, 1, self.state, False
        while made < limit:
            if (made - 1) % every == 0:
                check_stop()
                ended = state.ended[:rows].tolist()
                going = [row for row in range(rows) if not ended[row]]
                if not going:
                    break
                fewer = self._rows_for(len(going))
                if fewer < rows:
                    self._move([*going, *(row for row in range(rows) if ended[row])][:fewer], longest + made)
                    rows = fewer
            self._step(rows, longest + made)
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
        """Make these rows the first ones; at most `places` of them are filled."""
        import torch

        take = torch.tensor(rows, device=self.device)
        self.state.move(take)
        for layer in self.cache.layers:
            for kept in (layer.keys, layer.values):
                kept[: len(rows), :places] = kept[:, :places].index_select(0, take)

    def _step(self, rows: int, places: int) -> None:
        """Make the next token of the first rows, of which at most `places` are filled then."""
        if self.device.type != "cuda":
            return self._advance(rows, min(self.places, -(-places // ALIGNED) * ALIGNED))
        key = (rows, self.state.temperature)
        if key in self.graphs:
            return self.graphs[key].replay()
        # What libraries set up at their first call must not be captured. Capturing does not compute the step.
        self._advance(rows, self.places)
        self.graphs[key] = _capture(functools.partial(self._advance, rows, self.places), self.pool)
        self.pool = self.graphs[key].pool()

    def _advance(self, rows: int, attended: int) -> None:
        """Make the next token of the first rows by attention to the first `attended` places, as far as they are filled."""
        state = self.state
        at = state.order[:rows] * self.places + state.filled[:rows]

        def write(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            for kept, new in ((layer.keys, keys), (layer.values, values)):
                kept.view(-1, *kept.shape[2:]).index_copy_(0, at, new[:, :, 0])
            return layer.keys[:rows, :attended], layer.values[:rows, :attended]

        self._write_by(write)
        seen = state.places[:attended] <= state.filled[:rows, None]
        self.filled = (state.filled[:rows] + 1).int()
        logits = self.model(
            input_ids=state.token[:rows],
            attention_mask=as_bias(seen[:, None, None], self.model.dtype),
            position_ids=state.filled[:rows, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        state.filled[:rows].add_(1)
        state.choose(logits, slice(0, rows))
        state.count.add_(1)

    def _attend(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Any, None]:
        """Attention of prompts as transformers does it; of one token a row to what the row has filled."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if self.in_prompts:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if not self.flash:
            return attend(query, key, value, attention_mask, scaling)
        import torch

        rows, places = key.shape[:2]
        starts = self.state.order_with_end[: rows + 1]
        return torch.ops.aten._flash_attention_forward(
            query[:, :, 0], key.reshape(-1, *key.shape[2:]), value.reshape(-1, *value.shape[2:]), starts, starts * places,
            1, places, 0.0, False, False, scale=scaling, seqused_k=self.filled,
        )[0][:, None], None  # fmt: skip


@dataclass
class _State:
    """The rows of a decoder. All tensors keep their place in the memory, where captured steps find them."""

    token: Any
    """[rows, 1]: the last token of each row, which the next step reads."""
    filled: Any
    """[rows]: places of the row that are filled; the next token's position."""
    rows: Any
    """[rows]: which completion a row is."""
    ended: Any
    """[rows]: whether it has come to an end mark."""
    count: Any
    """[1]: tokens made so far."""
    chosen: Any
    """[completions, places]: the tokens made."""
    log_probs: Any
    """[completions, places]: their log probabilities, where they are drawn."""
    keys: Any
    """[rows, 2]: by which a row draws."""
    order: Any
    """[rows], [rows + 1] in 32 bits, and [places]: numbers from 0 on."""
    order_with_end: Any
    places: Any
    temperature: float = 0.0
    """0: the likeliest token is chosen."""
    stops: Any = None

    @classmethod
    def empty(cls, rows: int, places: int, device: Any) -> "_State":
        import torch

        def zeros(*shape: int, dtype: Any = torch.long) -> Any:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            token=zeros(rows, 1), filled=zeros(rows), rows=zeros(rows), ended=zeros(rows, dtype=torch.bool), count=zeros(1),
            chosen=zeros(rows, places), log_probs=zeros(rows, places, dtype=torch.float32), keys=zeros(rows, 2),
            order=torch.arange(rows, device=device), places=torch.arange(places, device=device),
            order_with_end=torch.arange(rows + 1, dtype=torch.int32, device=device),
        )  # fmt: skip

    def begin(self, stop_ids: list[int], limit: int, drawing: Drawing | None) -> None:
        """Forget what was, for completions up to `limit` tokens."""
        import torch

        stops = torch.tensor(stop_ids, dtype=torch.long, device=self.token.device)
        self.stops = stops if self.stops is None else self.stops.copy_(stops)
        self.chosen[:, :limit].zero_()
        self.count.zero_()
        self.ended.zero_()
        self.rows.copy_(self.order)
        self.temperature = drawing.temperature if drawing else 0.0
        if drawing:
            keys = [key for some in drawing.keys for key in some]
            self.keys[: len(keys)] = torch.tensor(keys, device=self.keys.device)

    def choose(self, logits: Any, rows: slice) -> None:
        """Choose the next token of some rows by their logits, [rows, vocabulary]."""
        import torch

        completions = self.rows[rows]
        if self.temperature:
            token, log_probs = draw(logits.float() / self.temperature, self.keys[rows], self.count)
            self.log_probs[completions, self.count] = log_probs
        else:
            token = logits.argmax(-1)
        self.token[rows, 0] = token
        self.chosen[completions, self.count] = token
        self.ended[rows] |= torch.isin(token, self.stops)

    def move(self, take: Any) -> None:
        """Make the rows that `take` names the first ones."""
        for kept in (self.token, self.filled, self.rows, self.ended, self.keys):
            kept[: len(take)] = kept.index_select(0, take)


def _has_flash(model: Any) -> bool:
    """Whether flash attention can attend to rows of various lengths, by torch's own operator."""
    import torch

    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    on_gpu = model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) >= (8, 0)
    return on_gpu and model.dtype in (torch.bfloat16, torch.float16) and width <= 256


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


def attend(query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None) -> tuple[Any, None]:
    """Attention of one token a row, whose heads that share keys and values are the queries of one head: nothing is repeated for
    them.

    query: [rows, heads, 1, width]; key, value: [rows, places, shared heads, width]; gives [rows, 1, heads, width].
    """
    import torch

    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[2], heads // key.shape[2], width)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key.transpose(1, 2), value.transpose(1, 2), attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, -1), None


def without_cudnn() -> Any:
    """A block in which attention with a mask is not cuDNN's, which plans anew for each length: the
    first completions took twice as long with it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
