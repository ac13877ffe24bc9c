"""Answers in a model: their rows padded where they have to be, and the log probability of each of their tokens."""

import logging
from typing import Any

from sft.data.tokenize import IGNORED
from sft.model.backend import torch_dtype
from sft.model.padding_free import ATTENTION
from sft.model.structure import attention_of, base_of
from sft.plan.plan import Plan
from sft.training import acceleration

log = logging.getLogger(__name__)

TAKEN = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_index", "key_uses",
         "target_positions")  # fmt: skip
"""What of a padding-free micro-batch the hidden states of its targets depend on."""


def padded(pad_token_id: int) -> Any:
    """A collator that pads rows on the right."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), pad_token_id)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return collate


def token_log_probs(model: Any, inputs: dict[str, Any], temperature: float = 1.0) -> Any:
    """The log probability of each target token of a micro-batch, [targets] in the order of its rows, with gradients; of logits
    divided by `temperature`. `inputs` is what a collator of rows gives, padding-free or `padded`.
    """
    import torch

    if "target_positions" in inputs:
        return model(**inputs, log_probs=True, temperature=temperature).logits
    labels = inputs["labels"][:, 1:]
    passed = {key: value for key, value in inputs.items() if key != "labels"}
    logits = model(**passed, use_cache=False).logits[:, :-1]
    wanted = labels != IGNORED
    logs = torch.log_softmax(logits[wanted].float() / temperature, -1)
    return logs.gather(1, labels[wanted][:, None])[:, 0]


def on_device(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """A micro-batch where the model is."""
    return {key: x.to(model.device) if hasattr(x, "to") else x for key, x in batch.items()}


def difference(model: Any, plan: Plan, shared: dict[str, Any], rows: dict[str, Any], counts: list[int]) -> str:
    """Compare the last hidden states of the answers of a micro-batch that share their prompts with those of the same answers
    as rows of their own, as `acceleration.settle` does with rows; empty if they agree. `counts` are the targets of each answer.
    """
    import torch

    dtype, base, states, training = torch_dtype(plan.dtype), base_of(model), [], model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype.itemsize == 2), \
                acceleration.evaluating(model, plan), attention_of(base, ATTENTION):  # fmt: skip
            for batch in (on_device(shared, model), on_device(rows, model)):
                at = batch.pop("target_positions")
                hidden = base.base_model(**batch, use_cache=False).last_hidden_state[0].float()
                states.append(hidden.index_select(0, at).split(counts))
    except Exception as error:  # whatever the model's code raises for arguments that it does not know
        log.debug("shared prompts", exc_info=True)
        return f"the model's forward pass does not take shared prompts ({type(error).__name__})"
    finally:
        model.train(training)
    away = max(float((one - alone).norm() / alone.norm()) for one, alone in zip(*states, strict=True))
    if not away <= acceleration.HIDDEN[dtype.itemsize]:
        return f"an answer would not be what it is alone: its hidden states differ by {100 * away:.2f} %"
    return ""
