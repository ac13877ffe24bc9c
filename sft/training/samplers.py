"""The order of rows: micro-batches with about as many tokens each, and the share of each process.

What is learnt in a step does not change by either.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from sft.distributed import group


def balance_micro_batches(rows: Sequence[int], lengths: Sequence[int], rows_a_pass: int) -> list[list[int]]:
    """The rows of a step in passes of `rows_a_pass` (the last one may have fewer), with about as many tokens in each pass.

    `lengths[row]` are the tokens of a row. The longest row left goes to the pass with the fewest tokens that has room (Graham's
    rule, 1969); inside a pass rows keep their order.
    """
    room = [min(rows_a_pass, len(rows) - start) for start in range(0, len(rows), rows_a_pass)]
    passes: list[list[int]] = [[] for _ in room]
    tokens = [0] * len(room)
    for at in sorted(range(len(rows)), key=lambda at: -lengths[rows[at]]):
        i = min((i for i in range(len(room)) if len(passes[i]) < room[i]), key=tokens.__getitem__)
        passes[i].append(at)
        tokens[i] += lengths[rows[at]]
    return [[rows[at] for at in sorted(one)] for one in passes]


class TokenBalancedSampler:
    """A sampler that gives the rows of another one, in the same steps, with about as many tokens in each pass of a step.

    What is learnt stays the same. The largest pass takes less memory, and where several processes share the passes of a step,
    none waits long for another: as they come, the larger of two passes has some 10 % more tokens than the mean.
    """

    def __init__(self, sampler: Any, lengths: Sequence[int], rows_a_pass: int, passes: int):
        """`lengths` are the tokens of each row that `sampler` names; a step has `passes` passes of `rows_a_pass` rows."""
        self.sampler, self.lengths, self.rows_a_pass, self.passes = sampler, lengths, rows_a_pass, passes

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows = iter(self.sampler)
        while step := list(itertools.islice(rows, self.rows_a_pass * self.passes)):
            yield from itertools.chain.from_iterable(balance_micro_batches(step, self.lengths, self.rows_a_pass))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as of this epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class PaddedDistributedSampler:
    """A sampler whose rows fall into equal shares: those of `sampler`, in its order, then fillers up to a multiple.

    accelerate deals out whole passes, one a rank in turn, so that a step has the rows it has with one process. Where the last
    step of an epoch has too few for that, accelerate would repeat rows of the epoch's beginning; a filler has nothing to learn,
    and counts for nothing.
    """

    def __init__(self, sampler: Any, rows: int, multiple: int):
        """`rows` is the number of rows, and of the filler, which stands behind them."""
        self.sampler, self.rows = sampler, rows
        self.fillers = -rows % multiple

    def __len__(self) -> int:
        return self.rows + self.fillers

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from [self.rows] * self.fillers

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as of this epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def settle_order(sampler: Any, rows: int) -> Any:
    """A trainer's sampler of `rows` rows as accelerate makes it in a run of one process; where it is wrapped, it does not."""
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import RandomSampler

    if not isinstance(sampler, RandomSampler):
        return sampler
    import torch

    return SeedableRandomSampler(range(rows), data_seed=group.broadcast(torch.random.initial_seed()))


def share_rows(sampler: Any, rows: int, rows_a_pass: int) -> Any:
    """A trainer's sampler of `rows` rows in passes of `rows_a_pass`, by which all ranks make the same number of passes."""
    if group.world_size() == 1:
        return sampler
    sampler = settle_order(sampler, rows)
    return PaddedDistributedSampler(range(rows) if sampler is None else sampler, rows, rows_a_pass * group.world_size())


def with_filler(dataset: Any, token: int) -> Any:
    """The rows, and behind them one of a single token with nothing to learn."""
    if group.world_size() == 1 or dataset is None:
        return dataset
    from datasets import Dataset, concatenate_datasets

    filler = Dataset.from_dict({"input_ids": [[token]], "labels": [[-100]]}, features=dataset.features)
    return concatenate_datasets([dataset, filler])


def epochs_done(epoch: float, rows: int, rows_a_pass: int) -> float:
    """Passes over the rows so far, from transformers' number of them, which counts a last pass of fillers as a pass."""
    if group.world_size() == 1 or not epoch:
        return epoch
    whole, part = divmod(epoch, 1)
    passes = -(-rows // rows_a_pass)
    each = -(-passes // group.world_size())
    return whole + min(round(part * each) * group.world_size(), passes) / passes


def passes_of_rank(passes: int) -> int:
    """Forward passes that each rank makes of a step's."""
    return passes // group.world_size()
