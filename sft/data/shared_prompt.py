"""Micro-batches in which a prompt stands once, with its answers behind it: the two of a pair, or the completions of a group.

    tokens    prompt | first answer | second answer              positions go on from the prompt in each answer
    queries  [prompt   first answer] [second answer]            segments of attention, as `cu_seq_lens_q` ends them
    keys     [prompt   first answer] [prompt   second answer]   `key_index` and `cu_seq_lens_k`

A query attends to the keys of its segment, causally and aligned at the end, as flash attention does where there are fewer
queries than keys. So an answer sees the prompt and itself. (Sharing the prefix: arXiv 2410.20305.)
"""

import itertools
from dataclasses import dataclass
from typing import Any

from sft.data.tokenize import IGNORED

Row = tuple[list[int], list[int]]
"""Ids and labels of a prompt with one of its answers."""


def shared_length(pair: dict[str, Any]) -> int:
    """Tokens at the start of both rows of a pair that are the same and no target of either."""
    both = zip(*(pair[name] for name in ("input_ids", "labels", "rejected_ids", "rejected_labels")), strict=False)
    same = itertools.takewhile(lambda at: at[0] == at[2] and at[1] == at[3] == IGNORED, both)
    return sum(1 for _ in same)


@dataclass
class SharedPromptCollator:
    """Concatenates pairs; the model's attention has to take `key_index` (sft/model/padding_free.py)."""

    pad_token_id: int
    longest: int
    """Tokens in the longest row there is, of a prompt with one answer."""
    lengths: tuple[int, ...] = ()
    """Lengths that a micro-batch is padded to, as PaddingFreeCollator has them."""
    pairs: int = 0
    """Pairs of a whole micro-batch. The ends of fewer are filled up to as many."""

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """A micro-batch of `pairs`: DPO's columns and `shared_length`. `lay_out` says what is in it: the chosen answer of the
        first pair, its rejected one, the chosen one of the next pair...
        """
        return self.lay_out([(_rows(pair), pair["shared_length"]) for pair in pairs])

    def lay_out(self, groups: list[tuple[list[Row], int]]) -> dict[str, Any]:
        """A micro-batch of groups: the rows of each, ids and labels, and the tokens of the prompt with which all of them begin.
        What PaddingFreeCollator gives, and

        key_index: [keys], the token of each key; twice the tokens where the micro-batch is padded.
        key_uses: [rows of the largest group, tokens], which keys a token is; the number of keys where it is no further one.
        target_positions, targets: of the first answer, of the second...
        target_counts: targets of each answer.
        """
        import numpy as np
        import torch

        segments = [part for rows, shared in groups for part in _segments(rows, shared)]
        sizes = [len(rows) for rows, _ in groups]
        firsts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        counts = [len(ids) for ids, *_ in segments]
        total = sum(counts)
        filling = next((n - total for n in self.lengths if n >= total), 0)
        if filling > self.longest:  # attention is computed for rows up to `longest`
            filling = 0
        starts = np.cumsum([0, *counts])
        ids = np.full(total + filling, self.pad_token_id)
        labels = np.full(total + filling, IGNORED)
        positions = np.zeros(total + filling, dtype=np.int64)
        positions[total:] = np.arange(filling)
        keys, key_ends, target_positions, target_counts = [], [0], [], []
        for (tokens, marks, before), begin, prompt_at in zip(segments, starts, starts[firsts], strict=False):
            end = begin + len(tokens)
            ids[begin:end], labels[begin:end] = tokens, marks
            positions[begin:end] = np.arange(before, before + len(tokens))
            if before == 0:
                labels[begin : begin + 1] = IGNORED  # nothing predicts it
            keys += [np.arange(prompt_at, prompt_at + before), np.arange(begin, end)]
            key_ends.append(key_ends[-1] + before + len(tokens))
            at = begin + np.flatnonzero(labels[begin:end] != IGNORED)
            target_positions.append(np.where(at == begin, prompt_at + before, at) - 1)
            target_counts.append(len(at))
        keys.append(np.arange(total, total + filling))
        key_index = np.concatenate(keys)
        if filling or (self.lengths and total in self.lengths):
            key_index = np.pad(key_index, (0, 2 * len(ids) - len(key_index)))  # the rest belongs to no segment
        used = key_ends[-1] + filling
        key_uses = np.full((max(sizes), len(ids)), len(key_index))
        order = np.argsort(key_index[:used], kind="stable")  # the keys by their token, and of one token as they come
        of_token = key_index[order]
        key_uses[np.arange(used) - np.searchsorted(of_token, of_token), of_token] = order
        more = 2 * max(0, self.pairs - len(groups))
        ends = [[*some, *[some[-1]] * more, some[-1] + filling] for some in (starts.tolist(), key_ends)]
        at = np.concatenate(target_positions)
        targets = np.concatenate([labels[a:b][labels[a:b] != IGNORED] for a, b in itertools.pairwise(starts)])
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": torch.from_numpy(labels)[None],
            "cu_seq_lens_q": torch.tensor(ends[0], dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor(ends[1], dtype=torch.int32),
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "key_index": torch.from_numpy(key_index),
            "key_uses": torch.from_numpy(key_uses),
            "target_positions": torch.from_numpy(at),
            "targets": torch.from_numpy(targets),
            "target_counts": target_counts,
        }


def _rows(pair: dict[str, Any]) -> list[Row]:
    return [(pair["input_ids"], pair["labels"]), (pair["rejected_ids"], pair["rejected_labels"])]


def _segments(rows: list[Row], shared: int) -> list[tuple[list[int], list[int], int]]:
    """(tokens, labels, tokens of the prompt that stand elsewhere) of the prompt with the first answer, and of the others."""
    return [(*rows[0], 0), *((ids[shared:], labels[shared:], shared) for ids, labels in rows[1:])]


def cut_shared(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of a micro-batch, as SharedPromptCollator took them."""
    ids, labels, ends = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist(), inputs["cu_seq_lens_q"].tolist()
    positions, pairs = inputs["position_ids"][0].tolist(), []
    segments = list(itertools.pairwise(ends[:-1]))  # the last one is the filling
    for (a, b), (_, c) in zip(segments[::2], segments[1::2], strict=True):
        if a == c:
            continue  # ends that are filled up
        shared = positions[b] if b < c else b - a
        pairs.append({"input_ids": ids[a:b], "labels": labels[a:b], "rejected_ids": ids[a : a + shared] + ids[b:c],
                      "rejected_labels": [IGNORED] * shared + labels[b:c], "shared_length": shared})  # fmt: skip
    return pairs
