"""The losses of held-out rows: each row's own, in the order of the data, whatever the micro-batches and processes."""

import pytest
import torch

from sft.data.collators import PaddingFreeCollator
from sft.training import held_out_rows


def test_a_micro_batch_is_summed_by_row_and_a_row_without_targets_counts_nothing():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [9], "labels": [-100]},
            {"input_ids": [4, 5, 6, 7], "labels": [-100, -100, -100, 7]}]  # fmt: skip
    inputs = PaddingFreeCollator(0, 4)(rows)
    found = held_out_rows.sum_by_row(torch.tensor([-1.0, -2.0, -4.0]), inputs)
    assert found.tolist() == [[3.0, 2.0], [0.0, 0.0], [4.0, 1.0]]


def test_rows_of_two_ranks_come_in_the_order_in_which_micro_batches_were_dealt(monkeypatch):
    first, second = [[[1.0, 1.0]], [[3.0, 1.0]]], [[[2.0, 1.0]], [[0.0, 0.0]]]
    monkeypatch.setattr(held_out_rows.group, "gathered", lambda mine: [mine, second])
    found = held_out_rows.gather_rows([torch.tensor(part) for part in first])
    assert found == [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]


@pytest.mark.parametrize("first", [True, False])
def test_one_process_alone_writes_them(tmp_path, monkeypatch, first):
    monkeypatch.setattr(held_out_rows.group, "is_first", lambda: first)
    held_out_rows.write_losses(tmp_path, 3, [0.12345678], [7])
    held_out_rows.write_rewards(tmp_path, 4, [1.0])
    lines = '{"step": 3, "losses": [0.123457], "targets": [7]}\n{"step": 4, "rewards": [1.0]}\n'
    assert (tmp_path / "eval_rows.jsonl").read_text() == lines if first else not list(tmp_path.iterdir())
