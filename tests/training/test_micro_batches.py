"""Rows of a step dealt out to passes with about as many tokens each."""

import random

import numpy as np
import pytest

from sft.config.batching import EVAL_ROWS, EVAL_TOKENS, MOST_EVAL_ROWS, eval_rows
from sft.config.schema import TrainerSettings
from sft.training.samplers import TokenBalancedSampler, balance_micro_batches


@pytest.mark.parametrize(
    ("rows", "micro_batch_size", "sizes"), [(32, 16, [16, 16]), (8, 2, [2] * 4), (7, 3, [3, 3, 1]), (2, 4, [2])]
)
def test_every_row_is_dealt_once_into_passes_of_the_same_sizes(rows, micro_batch_size, sizes):
    lengths = random.Random(rows).choices(range(5, 400), k=rows)
    step = random.Random(0).sample(range(rows), rows)
    passes = balance_micro_batches(step, lengths, micro_batch_size)
    assert [len(one) for one in passes] == sizes
    assert sorted(row for one in passes for row in one) == list(range(rows))
    assert all(one == sorted(one, key=step.index) for one in passes)


def test_passes_have_about_as_many_tokens_each():
    assert balance_micro_batches([0, 1, 2, 3], [100, 90, 10, 1], 2) == [[0, 3], [1, 2]]
    draw = random.Random(0)
    lengths = [int(draw.lognormvariate(4.65, 0.85)) + 60 for _ in range(1000)]
    worst = []
    for _ in range(100):
        step = draw.sample(range(1000), 32)
        tokens = [sum(lengths[row] for row in one) for one in balance_micro_batches(step, lengths, 16)]
        worst.append(2 * max(tokens) / sum(tokens))
    assert sum(worst) / 100 < 1.02


def test_a_sampler_keeps_its_steps():
    lengths = random.Random(1).choices(range(5, 400), k=45)
    order = random.Random(2).sample(range(45), 45)
    even = TokenBalancedSampler(order, lengths, micro_batch_size=4, micro_batches=5)
    dealt = list(even)
    assert len(even) == len(dealt) == 45 and dealt == list(even) != order
    for start in (0, 20, 40):
        assert sorted(dealt[start : start + 20]) == sorted(order[start : start + 20])
    even.set_epoch(1)  # a list has no epochs


def test_a_pass_of_an_evaluation_takes_as_many_rows_as_have_no_more_tokens_than_it_may():
    lengths = np.array([100] * 150 + [1000] * 30)
    rows = eval_rows(TrainerSettings(), lengths)

    def most(n):
        return max(sum(lengths[at : at + n].tolist()) for at in range(0, len(lengths), n))

    assert most(rows) <= EVAL_TOKENS and all(most(n) > EVAL_TOKENS for n in range(rows + 1, 181))
    assert eval_rows(TrainerSettings(), np.array([9000, 1])) == 1
    assert eval_rows(TrainerSettings(), np.array([10] * 1000)) == MOST_EVAL_ROWS
    assert eval_rows(TrainerSettings(per_device_eval_batch_size=3), lengths) == 3
    assert eval_rows(TrainerSettings()) == EVAL_ROWS
    few = np.array([10] * 101)
    assert [eval_rows(TrainerSettings(), few, processes) for processes in (1, 2, 4)] == [101, 51, 26]
