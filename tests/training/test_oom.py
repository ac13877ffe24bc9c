"""The rows of a pass, cut out of a batch however it is laid out."""

from types import SimpleNamespace

import pytest
import torch

from sft.data.collators import PaddingFreeCollator, cut
from sft.export import measure
from sft.model.loss import linear_cross_entropy
from sft.training.metrics import count_tokens


def test_rows_with_their_labels_come_back_from_padding_and_from_end_to_end():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    ids, labels = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[-100, 6, 7], [-100, -100, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert cut({"input_ids": ids, "labels": labels, "attention_mask": mask}) == rows
    flat = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 6, 7, -100]])}
    assert cut(flat | {"position_ids": torch.tensor([[0, 1, 2, 0]])}) == rows
    ours = PaddingFreeCollator(0, 4, lengths=(8,), rows=4)(rows)
    assert cut(ours) == rows and int(count_tokens(ours)) == 4 and ours["input_ids"].shape == (1, 8)


def test_a_pass_of_rows_without_anything_to_learn_has_a_loss_of_nothing():
    passed = PaddingFreeCollator(0, 4)([{"input_ids": [0], "labels": [-100]}])
    assert passed["target_positions"].dtype == passed["targets"].dtype == torch.long and not len(passed["target_positions"])
    hidden, head = torch.ones(1, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden.index_select(0, passed["target_positions"]), head, passed["targets"])
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not head.grad.any()


def test_what_an_export_is_held_against_is_measured_in_passes_that_fit():
    """Training has ended by then; a shortage of memory must not cost its result."""
    sizes = []

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, targets, **rest):
            if input_ids.shape[1] > 900:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(input_ids.shape[1])
            return SimpleNamespace(loss=targets.float().mean())

    rows = [measure.HeldOutRow("held_out", [n] * 300, [-100, *[n] * 299], 1, "", None) for n in range(1, 9)]
    assert measure.padding_free_loss(Model(), rows, PaddingFreeCollator(0, 300)) == pytest.approx(4.5)
    assert sizes == [900, 900, 600]
    with pytest.raises(torch.OutOfMemoryError):
        measure.padding_free_loss(
            Model(), [measure.HeldOutRow("held_out", [1] * 1000, [1] * 1000, 1, "", None)], PaddingFreeCollator(0, 1000)
        )
