"""The rows of a batch, however it is laid out."""

import torch

from sft.bad_steps import rows_of


def test_rows_come_back_from_a_padded_batch_and_from_rows_laid_end_to_end():
    rows = [[5, 6, 7], [8], [9, 10]]
    padded = torch.tensor([[5, 6, 7], [8, 0, 0], [9, 10, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    assert rows_of(padded, mask, None) == rows
    flat, positions = torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert rows_of(flat, None, positions) == rows
