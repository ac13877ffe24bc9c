"""Passes through the decoder layers that are recorded once as CUDA graphs and replayed.

A pass of an 8B shape launches some 5,000 kernels. An H100 computes up to 3,000 tokens faster than a host can launch them
(1,024 tokens: 139 ms launched one by one, 72 ms replayed). A graph holds for one number of tokens, so passes are
filled up to a few lengths. The output layer and the loss, whose size differs from pass to pass, are launched as ever.

Nothing else sees a difference: gradients arrive at the weights through autograd, copied out of the graph, so that passes add
up, gradients are clipped, several processes average them and bad steps are left out as without it.
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
"""Free bytes below which the GPU gets unused memory back before a recording."""

TENSORS = ("input_ids", "position_ids", "cu_seq_lens_q")

TAKEN = (*TENSORS, "max_length_q", "max_length_k")
"""What the layers take of a pass."""


class GraphPool:
    """The recorded passes of one model."""

    def __init__(self, base: Any, lengths: tuple[int, ...], ends: int):
        """`base`: the causal language model; `lengths`: tokens of a pass; `ends`: entries of its `cu_seq_lens_q`."""
        self.base, self.lengths, self.ends = base, lengths, ends
        self.weights = [p for p in base.base_model.parameters() if p.requires_grad]
        self.recorded: dict[int, CapturedStep] = {}
        self.begun = False
        """Whether a training pass has been seen."""
        self.pool: Any = None
        self.aside: Any = None
        self.grads: list[Any] = []

    def hidden(self, inputs: dict[str, Any]) -> Any:
        """The last hidden states [1, tokens, width] of a pass.

        The first pass of a training is launched, whatever it compiles or sets up; at the second one all lengths are recorded.
        Several processes then record at the same time, and none waits for another one's recording later.
        """
        import torch

        if not (self.base.training and torch.is_grad_enabled()):
            return self.run(inputs)
        if self.begun and self.lengths and not self.recorded:
            try:
                self._record(inputs)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                self.forget()
                log.warning("Passes are not recorded as CUDA graphs: %s", f"{error}".partition("\n")[0])
        self.begun = True
        recording = self.recorded.get(inputs["input_ids"].shape[-1])
        if recording is None or len(inputs["cu_seq_lens_q"]) != self.ends:
            return self.run(inputs)
        return _replay().apply(recording, inputs, *self.weights)

    def _record(self, inputs: dict[str, Any]) -> None:
        """Record a pass of each length, with what `inputs` says of the longest row.

        Each is launched first: what libraries set up at their first call must not be recorded (PyTorch's notes on CUDA graphs),
        and beside recorded passes there may be no room for a launched one.
        """
        import torch

        passes = [of_length(inputs, length, self.ends) for length in self.lengths]
        for one in passes:
            hidden = self.run(one)
            torch.autograd.grad(hidden, self.weights, torch.zeros_like(hidden))
        del hidden
        self.pool, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.grads = [torch.empty_like(p) for p in self.weights]
        recorded = {}
        for one in reversed(passes):  # the longest first: the others find room in what it has taken
            if not recorded or torch.cuda.mem_get_info()[0] < SPARE:
                torch.cuda.empty_cache()  # what is kept for passes that are launched is out of reach while one is recorded
            recorded[one["input_ids"].shape[-1]] = CapturedStep(self, one)
        self.recorded = recorded

    def run(self, inputs: dict[str, Any]) -> Any:
        """The last hidden states of a pass, launched kernel by kernel: all in the same way, since compiled layers would be
        compiled anew under another kind of autocast.
        """
        import torch

        half = {"dtype": torch.get_autocast_dtype("cuda"), "enabled": torch.is_autocast_enabled("cuda")}
        with torch.autocast("cuda", cache_enabled=False, **half):  # a cast weight kept from here would be stale in a replay
            ends = {"cu_seq_lens_k": inputs["cu_seq_lens_q"]}
            return self.base.base_model(**{k: inputs[k] for k in TAKEN}, **ends, use_cache=False).last_hidden_state

    def forget(self) -> bool:
        """Give the memory back and record nothing more; whether there was something to give back."""
        import torch

        had = bool(self.recorded)
        self.lengths, self.recorded, self.pool, self.aside, self.grads = (), {}, None, None, []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return had


class CapturedStep:
    """A forward and a backward pass of one length."""

    def __init__(self, graphs: GraphPool, inputs: dict[str, Any]):
        import torch

        self.grads = graphs.grads
        self.inputs = {key: inputs[key].clone() if torch.is_tensor(inputs[key]) else inputs[key] for key in TAKEN}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.autograd.set_multithreading_enabled(False), fresh_leaves(graphs.base.base_model) as leaves:
            with captured(self.forward, graphs):
                hidden = graphs.run(self.inputs)
            self.grad_hidden = torch.zeros_like(hidden)
            with captured(self.backward, graphs):
                torch._foreach_copy_(self.grads, torch.autograd.grad(hidden, leaves, self.grad_hidden))
        self.hidden = hidden.detach()


@contextlib.contextmanager
def fresh_leaves(model: Any) -> Iterator[list[Any]]:
    """Inside the block each trained weight of `model` is another leaf for autograd with the same memory; gives these leaves, in
    the order of the weights.

    Where processes average gradients, DistributedDataParallel holds on to the weights' own nodes in autograd's graph. They
    belong to the stream that was current when it began, and a recording on another stream, waiting for it, breaks off.
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
def captured(graph: Any, graphs: GraphPool) -> Iterator[None]:
    """What is launched inside becomes `graph`. torch.cuda.graph does the same and hands all free memory back to the GPU each
    time, to be asked for again by the next pass.
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
        def forward(ctx, recording, inputs, *weights):
            ctx.recording = recording
            for key in TENSORS:
                recording.inputs[key].copy_(inputs[key])
            recording.forward.replay()
            return recording.hidden.clone()  # the next replay writes over it

        @staticmethod
        def backward(ctx, grad):
            recording = ctx.recording
            recording.grad_hidden.copy_(grad)
            recording.backward.replay()
            return (None, None, *torch._foreach_mul(recording.grads, 1.0))  # copies, in a few launches

    return Replay


def of_length(inputs: dict[str, Any], length: int, count: int) -> dict[str, Any]:
    """A pass like `inputs`, of another length and with `count` ends of rows: to a recording it is all one what its tokens are
    and where its rows end.
    """
    import torch

    longest, ends = inputs["max_length_q"], inputs["cu_seq_lens_q"]
    places = torch.arange(length, device=ends.device)[None]
    starts = (torch.arange(count, device=ends.device, dtype=ends.dtype) * longest).clamp(max=length)
    return {**inputs, "input_ids": torch.zeros_like(places), "position_ids": places % longest, "cu_seq_lens_q": starts}


def launch_bound_tokens(layer: Any) -> int:
    """Tokens of a pass up to which recording it pays, for a model of such decoder layers."""
    import torch

    weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, torch.nn.Linear))
    return int(LAUNCH_BOUND / max(weights, 1))


def forget_graphs(model: Any) -> bool:
    """Give back the memory of recorded passes and launch every pass from now on; whether there was any."""
    recorded = getattr(base_of(model), "graphs", None)
    return recorded is not None and recorded.forget()
