"""Micro-batches through the decoder layers, captured once as CUDA graphs and replayed.

A forward and backward pass of an 8B shape launches some 5,000 kernels. An H100 computes up to 3,000 tokens faster than a host
can launch them (1,024 tokens: 139 ms eager, 72 ms replayed). A graph holds for one number of tokens, so micro-batches are
padded to a few lengths. The output layer and the loss, whose size differs from one to the next, stay eager.

Nothing else sees a difference: gradients arrive at the weights through autograd, copied out of the graph, so that
micro-batches add up, gradients are clipped, several processes average them and non-finite steps are skipped as without it.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

from sft.config.hardware import LAUNCH_BOUND
from sft.model.structure import base_of

log = logging.getLogger(__name__)

SPARE = 2 * 2**30
"""Free bytes below which the GPU gets unused memory back before a capture."""

TAKEN = ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q", "max_length_k")
"""What the layers take of a micro-batch."""

SHARED = ("cu_seq_lens_k", "key_index", "key_uses")
"""And of one in which two answers share a prompt."""


def taken(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the layers take of a micro-batch."""
    return {key: inputs[key] for key in (TAKEN + SHARED if "key_index" in inputs else TAKEN)}


class GraphPool:
    """The captured steps of one model, by their number of tokens."""

    def __init__(self, base: Any, lengths: tuple[int, ...], ends: int):
        """`base`: the causal language model; `lengths`: tokens of a micro-batch; `ends`: entries of its `cu_seq_lens_q`."""
        self.base, self.lengths, self.ends = base, lengths, ends
        self.weights = [p for p in base.base_model.parameters() if p.requires_grad]
        self.captured: dict[int, CapturedStep] = {}
        self.begun = False
        """Whether a micro-batch of the training has been seen."""
        self.pool: Any = None
        self.aside: Any = None
        self.grads: list[Any] = []

    def hidden(self, inputs: dict[str, Any]) -> Any:
        """The last hidden states [1, tokens, width] of a micro-batch.

        The first micro-batch of a training is eager, whatever it compiles or sets up; at the second all lengths are captured.
        Several processes then capture at the same time, and none waits for another one's capture later.
        """
        import torch

        if not (self.base.training and torch.is_grad_enabled()):
            return self.run(inputs)
        if self.begun and self.lengths and not self.captured:
            try:
                self._capture(inputs)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                self.forget()
                log.warning("Micro-batches are not captured as CUDA graphs: %s", f"{error}".partition("\n")[0])
        self.begun = True
        step = self.captured.get(inputs["input_ids"].shape[-1])
        if step is None or len(inputs["cu_seq_lens_q"]) != self.ends:
            return self.run(inputs)
        return _replay().apply(step, inputs, *self.weights)

    def _capture(self, inputs: dict[str, Any]) -> None:
        """Capture a step of each length, with what `inputs` says of the longest row.

        Each runs eagerly first: what libraries set up at a first call must not be captured (PyTorch's notes on CUDA graphs),
        and beside captured steps there may be no room for an eager one.
        """
        import torch

        micro_batches = [of_length(inputs, length, self.ends) for length in self.lengths]
        for one in micro_batches:
            hidden = self.run(one)
            torch.autograd.grad(hidden, self.weights, torch.zeros_like(hidden))
        del hidden
        self.pool, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.grads = [torch.empty_like(p) for p in self.weights]
        found = {}
        for one in reversed(micro_batches):  # the longest first: the others find room in what it has taken
            if not found or torch.cuda.mem_get_info()[0] < SPARE:
                torch.cuda.empty_cache()  # what is kept for eager steps is out of reach while one is captured
            found[one["input_ids"].shape[-1]] = CapturedStep(self, one)
        self.captured = found

    def run(self, inputs: dict[str, Any]) -> Any:
        """The last hidden states of a micro-batch, computed eagerly: all in the same way, since compiled layers would be
        compiled anew under another kind of autocast.
        """
        import torch

        half = {"dtype": torch.get_autocast_dtype("cuda"), "enabled": torch.is_autocast_enabled("cuda")}
        with torch.autocast("cuda", cache_enabled=False, **half):  # a cast weight kept from here would be stale in a replay
            ends = {"cu_seq_lens_k": inputs["cu_seq_lens_q"]}
            return self.base.base_model(**{**ends, **taken(inputs)}, use_cache=False).last_hidden_state

    def forget(self) -> bool:
        """Free the memory and capture nothing more; whether there was something to free."""
        import torch

        had = bool(self.captured)
        self.lengths, self.captured, self.pool, self.aside, self.grads = (), {}, None, None, []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return had


class CapturedStep:
    """A forward and a backward pass of one length."""

    def __init__(self, graphs: GraphPool, inputs: dict[str, Any]):
        import torch

        self.grads = graphs.grads
        self.inputs = {key: x.clone() if torch.is_tensor(x) else x for key, x in taken(inputs).items()}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.autograd.set_multithreading_enabled(False), fresh_leaves(graphs.base.base_model) as leaves:
            with _capturing(self.forward, graphs):
                hidden = graphs.run(self.inputs)
            self.grad_hidden = torch.zeros_like(hidden)
            with _capturing(self.backward, graphs):
                torch._foreach_copy_(self.grads, torch.autograd.grad(hidden, leaves, self.grad_hidden))
        self.hidden = hidden.detach()


@contextlib.contextmanager
def fresh_leaves(model: Any) -> Iterator[list[Any]]:
    """Inside the block each trained weight of `model` is another leaf for autograd with the same memory; gives these leaves, in
    the order of the weights.

    Where processes average gradients, DistributedDataParallel holds on to the weights' own nodes in autograd's graph. They
    belong to the stream that was current when it began, and a capture on another stream, waiting for it, breaks off.
    """
    import torch

    weights = {p: torch.nn.Parameter(p.detach()) for p in model.parameters() if p.requires_grad}
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p in weights]
    for module, name, weight in places:
        module._parameters[name] = weights[weight]
    try:
        yield list(weights.values())
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


@contextlib.contextmanager
def _capturing(graph: Any, graphs: GraphPool) -> Iterator[None]:
    """The kernels of the block become `graph`. torch.cuda.graph does the same and frees all unused memory each time, to be
    requested again by the next step.
    """
    import torch

    torch.cuda.synchronize()
    with torch.cuda.stream(graphs.aside):
        # thread_local: other threads, such as the one that watches NCCL, go on calling CUDA.
        graph.capture_begin(pool=graphs.pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


@functools.cache
def _replay() -> Any:
    import torch

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, step, inputs, *weights):
            ctx.step = step
            for key, x in step.inputs.items():
                if torch.is_tensor(x):
                    x.copy_(inputs[key])
            step.forward.replay()
            return step.hidden.clone()  # the next replay writes over it

        @staticmethod
        def backward(ctx, grad):
            step = ctx.step
            step.grad_hidden.copy_(grad)
            step.backward.replay()
            return (None, None, *torch._foreach_mul(step.grads, 1.0))  # copies, in a few launches

    return Replay


def of_length(inputs: dict[str, Any], length: int, count: int) -> dict[str, Any]:
    """A micro-batch like `inputs`, of another length and with `count` ends of rows: to a capture it is all one what its tokens
    are and where its rows end.
    """
    import torch

    longest, ends = inputs["max_length_q"], inputs["cu_seq_lens_q"]
    places = torch.arange(length, device=ends.device)[None]
    starts = (torch.arange(count, device=ends.device, dtype=ends.dtype) * longest).clamp(max=length)
    made = {**inputs, "input_ids": torch.zeros_like(places), "position_ids": places % longest, "cu_seq_lens_q": starts}
    if "key_index" not in inputs:
        return made
    unused = torch.full_like(places, 2 * length)
    return {**made, "cu_seq_lens_k": starts.clone(), "key_index": torch.cat([places[0], places[0]]),
            "key_uses": torch.cat([places, unused])}  # fmt: skip


def launch_bound_tokens(layer: Any) -> int:
    """Tokens of a micro-batch up to which capturing it pays, for a model of such decoder layers."""
    import torch

    weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, torch.nn.Linear))
    return int(LAUNCH_BOUND / max(weights, 1))


def forget_graphs(model: Any) -> bool:
    """Free the memory of captured steps and stay eager from now on; whether there was any."""
    graphs = getattr(base_of(model), "graphs", None)
    return graphs is not None and graphs.forget()
