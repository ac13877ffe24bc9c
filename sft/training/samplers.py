"""The order of rows: micro-batches with about as many tokens each, and the share of each process.

What the model learns in a step does not change by either.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from sft.distributed import group


def balance_micro_batches(rows: Sequence[int], lengths: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """The rows of a step in micro-batches of `micro_batch_size` (the last may have fewer), with about as many tokens in each.

    `lengths[row]` are the tokens of a row. The longest row left goes to the micro-batch with the fewest tokens that has room
    (Graham's rule, 1969); inside a micro-batch rows keep their order.
    """
    room = [min(micro_batch_size, len(rows) - start) for start in range(0, len(rows), micro_batch_size)]
    micro_batches: list[list[int]] = [[] for _ in room]
    tokens = [0] * len(room)
    for at in sorted(range(len(rows)), key=lambda at: -lengths[rows[at]]):
        i = min((i for i in range(len(room)) if len(micro_batches[i]) < room[i]), key=tokens.__getitem__)
        micro_batches[i].append(at)
        tokens[i] += lengths[rows[at]]
    return [[rows[at] for at in sorted(one)] for one in micro_batches]


class TokenBalancedSampler:
    """A sampler that gives the rows of another one, in the same steps, with about as many tokens in each micro-batch of a step.

    What the model learns stays the same. The largest micro-batch takes less memory, and where several processes share those of
    a step, none waits long for another: as they come, the larger of two has some 10 % more tokens than the mean.
    """

    def __init__(self, sampler: Any, lengths: Sequence[int], micro_batch_size: int, micro_batches: int):
        """`lengths` are the tokens of each row that `sampler` names; a step has `micro_batches` of `micro_batch_size`
        rows."""
        self.sampler, self.lengths, self.micro_batch_size, self.micro_batches = (
            sampler,
            lengths,
            micro_batch_size,
            micro_batches,
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows = iter(self.sampler)
        while step := list(itertools.islice(rows, self.micro_batch_size * self.micro_batches)):
            yield from itertools.chain.from_iterable(balance_micro_batches(step, self.lengths, self.micro_batch_size))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as of this epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class PaddedDistributedSampler:
    """A sampler whose rows fall into equal shares: those of `sampler`, in its order, then fillers up to a multiple.

    accelerate deals out whole micro-batches, one a rank in turn, so that a step has the rows it has with one process. Where the
    last step of an epoch has too few for that, accelerate would repeat rows of the epoch's beginning; a filler has nothing to
    learn, and counts for nothing.
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


class RepeatedSteps:
    """A sampler that gives the rows of each step of another one several times, for as many updates by one rollout.

    The last step of an epoch is filled up to whole micro-batches, so that none holds rows of two steps.
    """

    def __init__(self, sampler: Any, sizes: tuple[int, int], times: int, filler: int):
        """`sizes` are the rows of a step and of a micro-batch; `filler` is the row that fills up."""
        self.sampler, (self.rows, self.micro_batch_size), self.times, self.filler = sampler, sizes, times, filler

    def __len__(self) -> int:
        whole, left = divmod(len(self.sampler), self.rows)
        return (whole * self.rows + left + -left % self.micro_batch_size) * self.times

    def __iter__(self) -> Iterator[int]:
        rows = iter(self.sampler)
        while step := list(itertools.islice(rows, self.rows)):
            yield from (step + [self.filler] * (-len(step) % self.micro_batch_size)) * self.times

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


def share_rows(sampler: Any, rows: int, micro_batch_size: int) -> Any:
    """A trainer's sampler of `rows` rows in micro-batches of `micro_batch_size`, by which all ranks have as many of them."""
    if group.world_size() == 1:
        return sampler
    sampler = settle_order(sampler, rows)
    return PaddedDistributedSampler(range(rows) if sampler is None else sampler, rows, micro_batch_size * group.world_size())


def balance_steps(sampler: Any, lengths: Sequence[int], micro_batch_size: int, micro_batches: int, filler: int) -> Any:
    """A trainer's sampler of rows with these `lengths`, shared among ranks, by which the micro-batches of a step have about as
    many tokens each. `filler` are the tokens of a row that fills up."""
    rows = len(lengths)
    if micro_batches == 1:
        return share_rows(sampler, rows, micro_batch_size)
    ordered = share_rows(settle_order(sampler, rows), rows, micro_batch_size)
    return TokenBalancedSampler(ordered, [*lengths, filler], micro_batch_size, micro_batches)


def with_filler(dataset: Any, token: int, always: bool = False, **others: Any) -> Any:
    """The rows, and behind them one of a single token with nothing to learn, where shares have to be filled up, or `always`;
    `others` are what it has in other columns.
    """
    if (group.world_size() == 1 and not always) or dataset is None:
        return dataset
    from datasets import Dataset, concatenate_datasets

    row = {"input_ids": [token], "labels": [-100], **others}
    filler = Dataset.from_dict({name: [row[name]] for name in dataset.column_names}, features=dataset.features)
    return concatenate_datasets([dataset, filler])


def epochs_done(epoch: float, rows: int, micro_batch_size: int) -> float:
    """Epochs so far, from transformers' number of them, which counts a last micro-batch of fillers as one."""
    if group.world_size() == 1 or not epoch:
        return epoch
    whole, part = divmod(epoch, 1)
    micro_batches = -(-rows // micro_batch_size)
    each = -(-micro_batches // group.world_size())
    return whole + min(round(part * each) * group.world_size(), micro_batches) / micro_batches


def micro_batches_of_rank(micro_batches: int) -> int:
    """Micro-batches of a step that each rank computes."""
    return micro_batches // group.world_size()
