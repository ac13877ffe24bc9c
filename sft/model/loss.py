"""Cross entropy straight from the last hidden states, a piece at a time, so that the logits of all tokens never exist.

A vocabulary of 128,256 makes the logits of 8,000 tokens 4 GB in float32, and their gradient as much again. The output layer is
frozen under LoRA, so that the gradient of the hidden states can be had in the forward pass, while a piece's logits are there:
each piece costs two products with the output layer and nothing is computed twice. (The idea is that of Liger Kernel's fused
linear cross entropy, arXiv 2410.10989.)
"""

import functools
from typing import Any

from sft.config.hardware import PIECE


def linear_cross_entropy(hidden: Any, weight: Any, targets: Any, cap: float | None = None) -> Any:
    """The cross entropy of `hidden` [n, width] times `weight` [vocabulary, width] with `targets` [n], summed over n; float32.
    `cap` bends the logits so that they stay below it, as Gemma's `final_logit_softcapping`.

    Its gradient reaches `hidden`, and `weight` where that is trained.
    """
    return _function().apply(hidden, weight, targets, cap)


def linear_log_probs(hidden: Any, weight: Any, targets: Any, temperature: float = 1.0, cap: float | None = None) -> Any:
    """The log probability of each of `targets` [n] by `hidden` [n, width] times `weight` [vocabulary, width], bent by `cap` and
    divided by `temperature`: [n], float32.

    Its gradient reaches `hidden`; the weights of an output layer that is trained get theirs from whole logits, which take the
    memory that the pieces save.
    """
    import torch

    if weight.requires_grad:
        logits = (hidden @ weight.to(hidden.dtype).t()).float()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return torch.log_softmax(logits / temperature, -1).gather(1, targets[:, None])[:, 0]
    return _log_probs().apply(hidden, weight, targets, temperature, cap)


def _bent(logits: Any, cap: float) -> tuple[Any, Any]:
    """(the logits as `cap` bends them, the slope there), float32."""
    share = logits.float().div_(cap).tanh_()
    return share * cap, share.square_().neg_().add_(1)


@functools.cache
def _log_probs() -> Any:
    import torch

    class LinearLogProbs(torch.autograd.Function):
        """The gradient of one token's log probability by its hidden state is one vector, made while the piece's logits are
        there and scaled by what comes from above.
        """

        @staticmethod
        def forward(ctx, hidden, weight, targets, temperature, cap):
            weight, ctx.temperature = weight.to(hidden.dtype), temperature
            found = hidden.new_empty(len(targets), dtype=torch.float32)
            grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            step = max(1, PIECE // weight.shape[0] // (2 if cap else 1))
            with torch.autocast(hidden.device.type, enabled=False):
                for at in range(0, hidden.shape[0], step):
                    part, aims = hidden[at : at + step], targets[at : at + step, None]
                    logits, slope = part @ weight.t(), None
                    if cap:
                        logits, slope = _bent(logits, cap)
                    if temperature != 1:
                        logits = logits.float().div_(temperature)
                    logs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                    del logits
                    found[at : at + step] = logs.gather(1, aims)[:, 0]
                    if grad is not None:
                        less = logs.exp_().neg_().scatter_add_(1, aims, torch.ones_like(aims, dtype=logs.dtype))
                        less = less if slope is None else less.mul_(slope)
                        torch.mm(less.to(hidden.dtype), weight, out=grad[at : at + step])
                        del less
                    del logs, slope
            ctx.save_for_backward(grad)
            return found

        @staticmethod
        def backward(ctx, grad_found):
            (grad,) = ctx.saved_tensors
            return (grad.float() * (grad_found / ctx.temperature)[:, None]).to(grad.dtype), None, None, None, None

    return LinearLogProbs


@functools.cache
def _function() -> Any:
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, cap):
            wanted, trained = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
            weight_now = weight.to(hidden.dtype)
            total = hidden.new_zeros((), dtype=torch.float32)
            grad = torch.empty_like(hidden) if wanted else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
            # A piece of bent logits holds as much again, with their slopes.
            step = max(1, PIECE // weight.shape[0] // (2 if cap else 1))
            with torch.autocast(hidden.device.type, enabled=False):
                for at in range(0, hidden.shape[0], step):
                    part, aims = hidden[at : at + step], targets[at : at + step, None]
                    logits, slope = part @ weight_now.t(), None
                    if cap:
                        logits, slope = _bent(logits, cap)
                    # One kernel that reads the logits in their own type and writes float32; logsumexp takes five.
                    logs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                    del logits
                    total -= logs.gather(1, aims).sum()
                    if not (wanted or trained):
                        del logs, slope  # as wide as the vocabulary: nothing of a piece waits beside the next one
                        continue
                    logs.exp_().scatter_add_(1, aims, torch.full_like(aims, -1.0, dtype=logs.dtype))  # less what was right
                    chances = (logs if slope is None else logs.mul_(slope)).to(hidden.dtype)
                    del logs, slope
                    if wanted:
                        torch.mm(chances, weight_now, out=grad[at : at + step])
                    if trained:
                        grad_weight += chances.t().float() @ part.float()
                    del chances
            ctx.save_for_backward(grad, grad_weight)
            ctx.weight_dtype = weight.dtype
            return total

        @staticmethod
        def backward(ctx, grad_total):
            grad, grad_weight = ctx.saved_tensors
            # In float32, and only then in the hidden states' type: a share of many thousand tokens is small for 16 bits.
            grad = None if grad is None else (grad.float() * grad_total).to(grad.dtype)
            grad_weight = None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype)
            return grad, grad_weight, None, None

    return LinearCrossEntropy
