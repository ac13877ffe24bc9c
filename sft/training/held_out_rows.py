"""eval_rows.jsonl: what each evaluation finds of every held-out row, so that two of them can be compared row by row."""

from pathlib import Path
from typing import Any

from sft.distributed import group
from sft.storage.jsonio import append_jsonl


def sum_by_row(log_probs: Any, inputs: dict[str, Any]) -> Any:
    """(summed loss, target tokens) of each row of a padding-free micro-batch that is not filled up, [rows, 2] in float64.

    `log_probs` are those of its target tokens, in their order. Nothing waits for the device.
    """
    import torch

    ends = inputs["cu_seq_lens_q"][1:-1]  # the last segment is the filling
    rows = torch.bucketize(inputs["target_positions"], ends, right=True)
    found = torch.zeros(len(ends), 2, dtype=torch.float64, device=log_probs.device)
    return found.index_add_(0, rows, torch.stack([-log_probs.double(), torch.ones_like(log_probs).double()], 1))


def gather_rows(micro_batches: list[Any]) -> list[list[float]]:
    """The rows of all ranks in the order of the data, of which whole micro-batches were dealt out in turn; without fillers."""
    dealt = zip(*group.gathered([found.tolist() for found in micro_batches]), strict=True)
    return [row for turn in dealt for some in turn for row in some if row[1]]


def write_losses(folder: Path, step: int, losses: list[float], targets: list[int]) -> None:
    """Add the mean loss and the target tokens of each row at a step."""
    if group.is_first():
        rounded = [round(loss, 6) for loss in losses]
        append_jsonl(folder / "eval_rows.jsonl", {"step": step, "losses": rounded, "targets": targets})


def write_rewards(folder: Path, step: int, rewards: list[float]) -> None:
    """Add the reward of each held-out prompt's greedy completion at a step."""
    if group.is_first():
        append_jsonl(folder / "eval_rows.jsonl", {"step": step, "rewards": [round(reward, 6) for reward in rewards]})
