"""The rows of a pass, cut out of a batch however it is laid out."""

import torch

from sft.smaller_passes import cut


def test_rows_with_their_labels_come_back_from_padding_and_from_end_to_end():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    ids, labels = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[-100, 6, 7], [-100, -100, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert cut({"input_ids": ids, "labels": labels, "attention_mask": mask}) == rows
    flat = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 6, 7, -100]])}
    assert cut(flat | {"position_ids": torch.tensor([[0, 1, 2, 0]])}) == rows
