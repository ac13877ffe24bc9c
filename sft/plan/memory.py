"""How much GPU memory a run will take at its peak, estimated from the model's shape before a weight is loaded.

    weights + adapter, gradients and optimiser + what the forward pass keeps for the backward pass + the largest passing need

The sizes of the weights are exact: the model is built on torch's meta device, which holds shapes and no numbers. What a forward
pass keeps is counted from the layers' code: a Llama-like decoder layer (RMSNorm, attention, gated MLP), and what
sft/model/dims.py finds besides (norms of heads, gated delta nets, short convolutions, sinks). Other kinds are estimated less
well. Of a mixture of experts the weights of all are held, and a token keeps what those make of it that it is sent to; adapters
on experts are not estimated: PEFT then makes a copy of a layer's experts, which was not measured.
`benchmarks/memory_table.py` compares the estimate with a GPU.
"""

import statistics
from dataclasses import dataclass, replace

from sft.config.batching import BatchPlan, batch_plan_of, effective_batch_size
from sft.config.hardware import CONTEXT, GIB, LAUNCH_BOUND, PIECE
from sft.config.schema import Settings

FRAGMENTATION = 1.02
"""torch reserves more than tensors hold: 6.29 for 6.21 GiB and 15.79 for 15.74 through Unsloth."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in nf4: 4 bits, an 8-bit scale for 64 weights, a 32-bit one for 256 of those (double quantisation, section 3 of
QLoRA, arXiv 2305.14314)."""

NF4_OPEN_BYTES = 0.5 + 4 / 64
"""The same in the form of sft/model/nf4.py: a 32-bit scale for 64 weights."""

READ = 200
"""Tokens that could be computed while a micro-batch reads the weights: of an 8B shape on an H200 one takes 12 ms besides 62 us
a token in bf16, and 13 ms besides 44 us in FP8 (benchmarks/grid.py, 1 to 128 rows a step)."""

UNPACKED = 200
"""Tokens that could be computed while the 4-bit weights of a model are unpacked for a micro-batch: with an 8B shape a step of
1,520 tokens takes 13 ms longer than in bf16 on an H100, where a token takes 67 us."""

CHUNK = 256
"""Target tokens whose logits TRL's loss makes at a time (_CHUNKED_LM_HEAD_CHUNK_SIZE in sft_trainer.py)."""

OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0, "paged_adamw": 0,
                   "sgd": 0, "adafactor": 0.1, "lion_8bit": 1, "lion_32bit": 4, "rmsprop": 4, "adagrad": 4}  # fmt: skip
"""Bytes of optimiser state a trained weight; Adam's two float32 moments (8) for every optimiser not named."""


@dataclass(frozen=True)
class ModelDims:
    """Numbers of a model and its adapter that memory depends on. Widths are in values, not bytes."""

    parameters: int
    """All weights of the model, without an adapter."""
    packed: int
    """Those in linear layers other than the output one: what 4-bit and 8-bit loading packs."""
    trained: int
    """Weights of the adapter (of the whole model without one) and of `lora.modules_to_save`."""
    adapted_inputs: int
    """Widths of the inputs of all layers with an adapter, added up over the model."""
    largest: int
    """Weights of the largest packed layer."""
    hidden_size: int
    intermediate_size: int
    """Of a mixture, that of all experts together that a token is sent to."""
    num_hidden_layers: int
    num_attention_heads: int
    query_size: int
    """Width of all query heads together, on average over the layers: some mix tokens without attention."""
    key_value_size: int
    """The same of all key heads; the value heads' is the same."""
    vocab_size: int
    routed: int = 0
    """Width of the results of all experts that a token is sent to; 0 without any."""
    inner_results: int = 3
    """Results of intermediate_size that a feed-forward block keeps: gate, its activation and up. Experts that clamp these, as
    gpt-oss's, keep six."""
    norms: int = 0
    """Width of a layer's norms beside the two of hidden_size, on average: of heads, or after its blocks."""
    mixing: int = 0
    """Values that a token mixer keeps beside queries, keys, values and their result, on average over the layers."""
    mixing_float: int = 0
    """Those that it keeps in float32."""
    sinks: bool = False
    """Whether its attention has sinks: torch's own has none, so that transformers keeps a score for each pair of tokens."""
    whole_logits: bool = False
    """Whether TRL's loss in chunks is not for it: its logits are scaled, or its output layer has an adapter."""
    widest_head: int = 0
    """Width of the widest attention head; 0 where it does not matter."""
    why_padded: str = ""
    """Why its rows cannot be padding-free, as far as that shows without its weights."""


@dataclass(frozen=True)
class LoadPlan:
    """How a model of some shape is loaded and trained."""

    backend: str = "unsloth"
    """`unsloth` or `transformers`."""
    bits: int = 16
    """Of a packed weight: 4, 8 or 16; 32 in float32."""
    fp8: int = 0
    """Bytes of a packed weight where it is kept in FP8 (sft/model/fp8.py): 1, or 2 where it is kept transposed too. `bits` are
    those that are computed in around it."""
    full: bool = False
    """Whether every weight is trained."""
    checkpointing: bool = True
    optim: str = "adamw_torch"
    adapter_bytes: int = 4
    """Of a trained weight and its gradient, which are float32: an adapter's by PEFT and Unsloth, else by model/loading.py."""
    dropout: bool = False
    eager: bool = False
    """Whether attention keeps a score for each pair of tokens."""
    padding_free: bool = False
    """Whether it is padding-free, with the loss made in pieces (sft/model/padding_free.py)."""
    compiled: bool = False
    """Whether its layers are compiled."""
    padded: bool = False
    """Whether its rows are padded, so that attention gets a mask."""
    chunked: bool = False
    """Whether these have TRL's loss, which makes the logits a chunk at a time."""
    every_n_layers: int = 1
    """With checkpointing one of so many layers is recomputed, and the others are kept."""
    rollout_tokens: int = 0
    """Tokens of the completions that are drawn together, their prompts included: their keys and values are held throughout."""

    def recomputed(self, layers: int) -> int:
        """Of so many layers those that are recomputed."""
        return -(-layers // self.every_n_layers) if self.checkpointing else 0


@dataclass(frozen=True)
class Estimate:
    """Peak memory by what it is for, in GiB."""

    weights: float
    trained: float
    """Adapter or trained weights, their gradients and the optimiser."""
    activations: float
    """What is kept from the forward pass, and the largest need of a single layer or of the loss on top of it."""
    rollouts: float = 0.0
    """Keys and values of the completions that are drawn together."""
    recorded: float = 0.0
    """What captured steps (sft/model/cuda_graphs.py) hold besides, under its key in preflight.json; given up where the memory
    runs short."""

    @property
    def allocated(self) -> float:
        """Held by tensors: `torch.cuda.max_memory_allocated`."""
        return self.weights + self.trained + self.activations + self.rollouts

    @property
    def reserved(self) -> float:
        """Taken from the GPU by torch: `torch.cuda.max_memory_reserved`."""
        return self.allocated * FRAGMENTATION + self.recorded

    @property
    def needed(self) -> float:
        """What has to be free on the GPU."""
        return self.allocated * FRAGMENTATION + CONTEXT


def estimate(shape: ModelDims, load: LoadPlan, rows: int, length: int) -> Estimate:
    """The peak of training with `rows` rows of `length` tokens in one micro-batch."""
    tokens, layers, hidden = rows * length, shape.num_hidden_layers, shape.hidden_size
    value = 4 if load.bits == 32 else 2  # bytes of an activation
    weights = _weight_bytes(shape, load, value)
    if load.full:
        size = max(value, load.adapter_bytes)
        moments = 2 if "8bit" in load.optim else 2 * size  # in the weights' type
        # The weights themselves are counted above: in 16 bits, where autocast makes copies of them for a step.
        trained = shape.trained * (size + moments + (size if size > value else 0))
    else:
        trained = shape.trained * (2 * load.adapter_bytes + _optimizer_bytes(load))
    layer = kept_by_layer(shape, load, value) + _score_bytes(shape, load, length, value)
    # Gradients inside one layer; Unsloth writes those of the MLP over what it was made of.
    passing = value * ((2 if load.backend == "unsloth" else 4) * shape.intermediate_size + 2 * hidden + 2 * shape.routed)
    if shape.sinks:  # scores before the softmax, their gradients after and before it
        passing = max(passing, 3 * value * shape.num_attention_heads * length)
    recomputed = load.recomputed(layers)
    kept = (layers - recomputed) * layer
    if recomputed:  # Unsloth moves these layers' inputs to the CPU's memory while they wait
        kept, passing = kept + (0 if load.backend == "unsloth" else recomputed * value * hidden), passing + layer
    step_kept = kept
    kept += 4 * value * hidden  # the embeddings, the last norm, and the gradients at both ends
    activations = tokens * kept + max(tokens * passing, loss_bytes(shape, load, tokens))
    if load.bits in (4, 8):
        activations += value * shape.largest  # one packed layer at a time is unpacked to be multiplied
    recorded = 0.0
    if load.padding_free and not load.dropout:
        recorded = step_kept * min(tokens, LAUNCH_BOUND / (shape.packed / layers))
    rollouts = load.rollout_tokens * layers * 2 * shape.key_value_size * value
    return Estimate(weights / GIB, trained / GIB, activations / GIB, rollouts / GIB, recorded / GIB)


def _weight_bytes(shape: ModelDims, load: LoadPlan, value: int) -> float:
    """Packed weights by their bits; embeddings, output layer and norms as they are.

    bitsandbytes leaves the embeddings and the output layer alone (`get_keys_to_not_convert` in transformers), and so does
    sft/model/adapters.py in bfloat16. (In float16, on GPUs without bfloat16, PEFT turns them to float32.)
    """
    others = (shape.parameters - shape.packed) * value
    if load.bits == 4:
        return shape.packed * (NF4_OPEN_BYTES if load.padding_free else NF4_BYTES) + others
    if load.bits == 8 or load.fp8:
        return shape.packed * (load.fp8 or 1) + others
    return shape.parameters * value


def _optimizer_bytes(load: LoadPlan) -> float:
    # Moments have their weight's type, but for the 8-bit kinds.
    return OPTIMIZER_BYTES.get(load.optim, 2 * load.adapter_bytes)


def kept_by_layer(shape: ModelDims, load: LoadPlan, value: int = 2) -> float:
    """Bytes a token that one decoder layer keeps for its backward pass; the base weights are frozen.

    transformers (modeling_llama.py), each norm: its input in float32. Attention: queries, keys, values, the result. MLP: gate,
    its activation, up, and their product. The inputs of layers with an adapter are kept besides; under mixed precision PEFT
    makes a copy for each of them, though not where the weights are packed (its Linear4bit leaves that to autocast). That is 45
    hidden_size for Llama 3 8B without such copies, 53 with them.
    Unsloth's fused kernels keep the norms' inputs, queries, keys, values and the result, the inputs of the two blocks, gate and
    up: 27 hidden_size for Llama 3 8B.
    Of a mixture each expert's result is kept besides, for the gradient of the weight that it is added up with, and its input
    where its own weights are trained.
    torch.compile keeps the inputs of the norms, of the blocks and of the adapters' layers once, queries, keys, values, gate, up
    and their product: 36 hidden_size for Llama 3 8B (measured 36.5; 53.2 where nothing is compiled).
    With a mask, or with sinks, transformers repeats keys and values for the queries' heads (sdpa_attention.py, repeat_kv), and
    attention with sinks keeps no result of its own.
    """
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, 2 * shape.query_size + 2 * shape.key_value_size
    if shape.sinks or load.padded:
        heads = (3 if shape.sinks else 4) * shape.query_size
    if load.backend == "unsloth":
        kept = value * (4 * hidden + shape.norms + heads + 2 * inner)
    elif load.padding_free and load.compiled:
        kept = value * (5 * hidden + shape.norms + heads + 3 * inner)
    else:
        copies = load.adapter_bytes == 4 and load.bits == 16 and not load.full
        inputs = shape.adapted_inputs / shape.num_hidden_layers if copies else 2 * hidden + inner
        kept = 4 * (2 * hidden + shape.norms) + value * (heads + shape.inner_results * inner + inputs)
    kept += value * (shape.routed * (2 if load.full else 1) + shape.mixing) + 4 * shape.mixing_float
    if load.dropout:  # a copy and a mask for each adapter's input
        kept += (value + 1) * shape.adapted_inputs / shape.num_hidden_layers
    return kept


def _score_bytes(shape: ModelDims, load: LoadPlan, length: int, value: int) -> float:
    """What attention keeps of one token with all others of its row: its scores' softmax where there are sinks; the scores and
    their softmax, float32 inside and the activations' type around, where it is eager; else the mask, in the activations' type.
    """
    if shape.sinks:
        return shape.num_attention_heads * length * value
    if load.eager:
        return shape.num_attention_heads * length * (4 + 2 * value)
    return length * value if load.padded else 0


def loss_bytes(shape: ModelDims, load: LoadPlan, tokens: int) -> float:
    """The logits and their cross entropy.

    transformers: the log-softmax and two gradients, all float32 and as wide as the vocabulary (ForCausalLMLoss in
    loss_utils.py): 12 bytes a value. TRL's default makes those of CHUNK target tokens at a time (_chunk in sft_trainer.py):
    in the activations' type, and in float32 themselves, their log-softmax and its exponential or gradients, 18 bytes a value.
    Unsloth makes the logits a chunk at a time, as many tokens as 4 GiB hold at 16 bytes a value (fused_losses/
    cross_entropy_loss.py in unsloth_zoo); compiled, a chunk takes about 2 bytes a value. Padding-free: a piece's logits in the
    activations' type, in float32, and their gradient in the activations' type (sft/model/loss.py).
    """
    if load.padding_free:
        return 8 * min(tokens * shape.vocab_size, PIECE)
    if load.chunked and not shape.whole_logits:
        return 18 * min(tokens, CHUNK) * shape.vocab_size
    if load.backend != "unsloth":
        return 12 * tokens * shape.vocab_size
    chunk = 4 * GIB / (16 * shape.vocab_size)
    return 2 * min(tokens, chunk) * shape.vocab_size


def fitting_batch_plan(
    shape: ModelDims, settings: Settings, load: LoadPlan, lengths: list[int], capacity: float, choices: list[int]
) -> tuple[BatchPlan, Estimate]:
    """The fastest way to make a step of micro-batches of `choices` rows, most first, that fits into `capacity` GiB.

    Where rows are padded: the most rows, and checkpointing only if these rows do not fit without it. Padding-free: what costs
    least a token (`cost`), more rows or fewer layers that are recomputed. `lengths` are those of all rows. Where nothing fits,
    one row with checkpointing is returned.
    """
    longest = longest_rows(lengths, settings)
    mean = statistics.fmean(lengths or longest)
    wanted, set_by_hand = settings.trainer.gradient_checkpointing, settings.trainer.extra.get("gradient_checkpointing_kwargs")
    kept, recomputed = replace(load, checkpointing=False, every_n_layers=1), replace(load, checkpointing=True)
    loads = [kept, recomputed] if wanted is None else [recomputed if wanted else kept]
    if load.padding_free and wanted is None and not set_by_hand:
        layers = shape.num_hidden_layers
        every = sorted({layers // count for count in range(1, layers // 2 + 1)}, reverse=True)
        loads = [kept, *(replace(recomputed, every_n_layers=n) for n in every), recomputed]
    ways = [(rows, way) for rows in choices for way in loads]
    if load.padding_free:
        ways.sort(key=lambda way: cost(shape, way[1], way[0] * mean))  # stable: most rows first
    for rows, way in [*ways, (choices[-1], loads[-1])]:
        guess = estimate(shape, way, *largest(load, rows, longest))
        if guess.needed <= capacity:
            break
    return batch_plan_of(settings.trainer, rows, way.checkpointing, way.every_n_layers), guess


def cost(shape: ModelDims, load: LoadPlan, tokens: float) -> float:
    """What a token of a micro-batch of `tokens` costs beside one of many whose layers are computed once: half as much more if
    all of them are recomputed, since under LoRA a layer's backward pass is as many products with its weights as the forward
    one; and READ tokens more a micro-batch, with UNPACKED besides where the weights are in 4 bits.
    """
    recomputed = load.recomputed(shape.num_hidden_layers) / shape.num_hidden_layers
    return (1 + recomputed / 2) * (1 + (READ + UNPACKED * (load.bits == 4)) / tokens)


def largest(load: LoadPlan, rows: int, lengths: list[int]) -> tuple[int, int]:
    """(rows, their length) of the largest possible micro-batch of so many rows: each as long as its longest where they are
    padded, and one row of all of them where they are padding-free.

    `lengths` are those of the longest rows, longest first.
    """
    lengths = lengths[:rows]
    return (1, sum(lengths)) if load.backend == "unsloth" or load.padding_free else (rows, lengths[0])


def tokens_at_once(load: LoadPlan, rows: int, lengths: list[int]) -> int:
    """Tokens of the largest possible micro-batch."""
    rows, length = largest(load, rows, lengths)
    return rows * length


def longest_rows(lengths: list[int], settings: Settings) -> list[int]:
    """Tokens of the longest of the rows with these `lengths`, longest first, as many as a step has; as long as rows may be
    where none is known."""
    count = effective_batch_size(settings.trainer)
    longest = sorted(lengths, reverse=True)[:count] or [settings.model.max_seq_length]
    return longest + longest[:1] * (count - len(longest))
