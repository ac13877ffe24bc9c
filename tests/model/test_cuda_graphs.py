"""When steps are captured, and which are replayed. What a captured step computes is tested on a GPU (tests/gpu)."""

import logging
from types import SimpleNamespace

import pytest
import torch

from sft.data.collators import PaddingFreeCollator
from sft.model import cuda_graphs


class Counted(cuda_graphs.GraphPool):
    """Graphs that note the lengths they run eagerly, and make no kernels."""

    def __init__(self, lengths):
        layers = torch.nn.Linear(2, 2, bias=False)
        super().__init__(SimpleNamespace(training=True, base_model=layers), lengths, 4)
        self.eager = []

    def run(self, inputs):
        self.eager.append(inputs["input_ids"].shape[-1])
        return self.base.base_model.weight.sum() * torch.ones(1, self.eager[-1], 2)


@pytest.fixture
def captured(monkeypatch):
    """The lengths that were captured, in order."""
    made = []
    monkeypatch.setattr(cuda_graphs, "CapturedStep", lambda own, inputs: made.append(inputs["input_ids"].shape[-1]) or made[-1])
    monkeypatch.setattr(cuda_graphs, "_replay", lambda: SimpleNamespace(apply=lambda step, inputs, *weights: f"{step} again"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def passed(*counts, rows=2):
    return PaddingFreeCollator(0, 100, lengths=(64, 128), rows=rows)(
        [{"input_ids": [1] * n, "labels": [1] * n} for n in counts]
    )


def test_all_lengths_are_captured_at_the_second_micro_batch_and_replayed_from_then_on(captured):
    own = Counted((64, 128))
    assert torch.is_tensor(own.hidden(passed(30, 20))) and own.eager == [64] and captured == []
    assert own.hidden(passed(90, 20)) == "128 again", "a length that had not come up"
    assert own.eager == [64, 64, 128] and captured == [128, 64], "each runs eagerly before one is captured, longest first"
    assert own.hidden(passed(30, 20)) == "64 again" and own.eager == [64, 64, 128]
    for other in (passed(100, 90), passed(30, 20, rows=7)):  # too long; another number of rows
        assert torch.is_tensor(own.hidden(other))
    own.base.training = False
    assert torch.is_tensor(own.hidden(passed(30, 20)))
    own.base.training = True
    with torch.no_grad():
        assert torch.is_tensor(own.hidden(passed(30, 20)))
    assert captured == [128, 64]


def test_a_second_micro_batch_that_is_too_long_to_be_replayed_has_the_lengths_captured_all_the_same(captured):
    """Several processes capture in the same step, whatever their micro-batches are."""
    own = Counted((64, 128))
    for _ in range(2):
        assert torch.is_tensor(own.hidden(passed(100, 90)))
    assert captured == [128, 64]


def test_where_a_step_cannot_be_captured_none_is_any_more(captured, monkeypatch, caplog):
    def broken(own, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "CapturedStep", broken)
    own = Counted((64, 128))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.is_tensor(own.hidden(passed(30, 20)))
    assert [r.message for r in caplog.records] == [
        "Micro-batches are not captured as CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert own.lengths == () and not own.forget()
