"""Padding-free micro-batches: rows concatenated, with the ends that keep them apart; and any micro-batch cut into its rows."""

import itertools
from dataclasses import dataclass
from typing import Any

from sft.data.tokenize import IGNORED


@dataclass
class PaddingFreeCollator:
    """Concatenates the rows of a micro-batch; takes the place of TRL's collator."""

    pad_token_id: int
    longest: int
    """Tokens in the longest row there is: one number for a whole run, so that nothing is compiled or captured twice for it."""
    lengths: tuple[int, ...] = ()
    """Lengths that a micro-batch is padded to, shortest first, because each is captured as a CUDA graph. A longer one is left
    as it is; so is every one if there are none."""
    rows: int = 0
    """Rows of a whole micro-batch. The ends of fewer rows are filled up to as many, for the same reason."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One micro-batch of `rows` (`input_ids`, `labels`: lists or arrays), as a model with `install` takes it.

        input_ids, position_ids, labels: [1, tokens]; the first label of a row is IGNORED, since nothing predicts it.
        cu_seq_lens_q, cu_seq_lens_k: int32, the start of every row and the ends of the last one and of the filling behind it.
        target_positions: those whose output predicts a target token; targets: these tokens.
        """
        import numpy as np
        import torch

        counts = [len(row["input_ids"]) for row in rows]
        total = sum(counts)
        filling = next((n - total for n in self.lengths if n >= total), 0)
        if filling > self.longest:  # attention is computed for rows up to `longest`
            filling = 0
        ids = np.full(total + filling, self.pad_token_id)
        labels = np.full(total + filling, IGNORED)
        np.concatenate([row["input_ids"] for row in rows], out=ids[:total])
        np.concatenate([row["labels"] for row in rows], out=labels[:total])
        starts = np.cumsum([0, *counts])
        labels[starts[:-1]] = IGNORED
        positions = np.arange(total + filling) - np.repeat(starts, [*counts, filling])
        targets_at = np.flatnonzero(labels != IGNORED) - 1
        ends = [*starts, *[total] * (self.rows - len(rows)), total + filling]
        cu_seq_lens = torch.tensor(ends, dtype=torch.int32)
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": torch.from_numpy(labels)[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "target_positions": torch.from_numpy(targets_at),
            "targets": torch.from_numpy(labels[targets_at + 1]),
        }


def is_padding_free(inputs: dict[str, Any]) -> bool:
    """Whether a micro-batch was made by PaddingFreeCollator."""
    return "target_positions" in inputs


def cut(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The rows of any micro-batch, without padding: padded ones by their mask, padding-free ones by their ends.

    Those that Unsloth makes padding-free are cut where positions start again.
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    if mask is not None:
        places = [(i, 0, int(n)) for i, n in enumerate(mask.sum(-1).tolist())]
    elif is_padding_free(inputs):
        places = [(0, a, b) for a, b in pairs(inputs["cu_seq_lens_q"][:-1])]  # the last row is the filling
    else:
        starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        places = [(0, a, b) for a, b in zip(starts, [*starts[1:], ids.shape[-1]], strict=True)]
    return [{"input_ids": ids[i, a:b].tolist(), "labels": labels[i, a:b].tolist()} for i, a, b in places]


def pairs(ends: Any) -> list[tuple[int, int]]:
    places = ends.tolist()
    return [(a, b) for a, b in itertools.pairwise(places) if b > a]
