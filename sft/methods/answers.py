"""Answers in a model: their rows padded where they have to be, and the log probability of each of their tokens."""

from typing import Any

from sft.data.tokenize import IGNORED


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
