"""How several processes share out the rows of a step: as many passes to each, each row once. For one nothing changes."""

from collections.abc import Iterator
from typing import Any

from sft import distributed


class SharedRows:
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

    return SeedableRandomSampler(range(rows), data_seed=distributed.broadcast(torch.random.initial_seed()))


def share_rows(sampler: Any, rows: int, rows_a_pass: int) -> Any:
    """A trainer's sampler of `rows` rows in passes of `rows_a_pass`, by which all ranks make the same number of passes."""
    if distributed.world_size() == 1:
        return sampler
    sampler = settle_order(sampler, rows)
    return SharedRows(range(rows) if sampler is None else sampler, rows, rows_a_pass * distributed.world_size())


def with_filler(dataset: Any, token: int) -> Any:
    """The rows, and behind them one of a single token with nothing to learn."""
    if distributed.world_size() == 1 or dataset is None:
        return dataset
    from datasets import Dataset, concatenate_datasets

    filler = Dataset.from_dict({"input_ids": [[token]], "labels": [[-100]]}, features=dataset.features)
    return concatenate_datasets([dataset, filler])


def epochs_done(epoch: float, rows: int, rows_a_pass: int) -> float:
    """Passes over the rows so far, from transformers' number of them, which counts a last pass of fillers as a pass."""
    if distributed.world_size() == 1 or not epoch:
        return epoch
    whole, part = divmod(epoch, 1)
    passes = -(-rows // rows_a_pass)
    each = -(-passes // distributed.world_size())
    return whole + min(round(part * each) * distributed.world_size(), passes) / passes


def passes_of_rank(passes: int) -> int:
    """Forward passes that each rank makes of a step's."""
    return passes // distributed.world_size()
