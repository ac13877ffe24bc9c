"""When passes are recorded, and which are replayed. What a recording computes is tested on a GPU (tests/gpu)."""

import logging
from types import SimpleNamespace

import pytest
import torch

from sft.data.collators import PaddingFreeCollator
from sft.model import cuda_graphs


class Counted(cuda_graphs.GraphPool):
    """Graphs that note the lengths they launch, and make no kernels."""

    def __init__(self, lengths):
        layers = torch.nn.Linear(2, 2, bias=False)
        super().__init__(SimpleNamespace(training=True, base_model=layers), lengths, 4)
        self.launched = []

    def run(self, inputs):
        self.launched.append(inputs["input_ids"].shape[-1])
        return self.base.base_model.weight.sum() * torch.ones(1, self.launched[-1], 2)


@pytest.fixture
def recorded(monkeypatch):
    """The lengths that were recorded, in order."""
    made = []
    monkeypatch.setattr(cuda_graphs, "CapturedStep", lambda own, inputs: made.append(inputs["input_ids"].shape[-1]) or made[-1])
    monkeypatch.setattr(
        cuda_graphs, "_replay", lambda: SimpleNamespace(apply=lambda recording, inputs, *weights: f"{recording} again")
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def passed(*counts, rows=2):
    return PaddingFreeCollator(0, 100, lengths=(64, 128), rows=rows)(
        [{"input_ids": [1] * n, "labels": [1] * n} for n in counts]
    )


def test_all_lengths_are_recorded_at_the_second_pass_and_replayed_from_then_on(recorded):
    own = Counted((64, 128))
    assert torch.is_tensor(own.hidden(passed(30, 20))) and own.launched == [64] and recorded == []
    assert own.hidden(passed(90, 20)) == "128 again", "a length that had not come up"
    assert own.launched == [64, 64, 128] and recorded == [128, 64], "each is launched before one is recorded, longest first"
    assert own.hidden(passed(30, 20)) == "64 again" and own.launched == [64, 64, 128]
    for other in (passed(100, 90), passed(30, 20, rows=7)):  # too long; another number of rows
        assert torch.is_tensor(own.hidden(other))
    own.base.training = False
    assert torch.is_tensor(own.hidden(passed(30, 20)))
    own.base.training = True
    with torch.no_grad():
        assert torch.is_tensor(own.hidden(passed(30, 20)))
    assert recorded == [128, 64]


def test_a_second_pass_that_is_too_long_to_be_replayed_records_the_lengths_all_the_same(recorded):
    """Several processes record in the same step, whatever their passes are."""
    own = Counted((64, 128))
    for _ in range(2):
        assert torch.is_tensor(own.hidden(passed(100, 90)))
    assert recorded == [128, 64]


def test_where_a_pass_cannot_be_recorded_none_is_any_more(recorded, monkeypatch, caplog):
    def broken(own, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "CapturedStep", broken)
    own = Counted((64, 128))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.is_tensor(own.hidden(passed(30, 20)))
    assert [r.message for r in caplog.records] == [
        "Passes are not recorded as CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert own.lengths == () and not own.forget()
