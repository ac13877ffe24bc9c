"""What an export is measured on, and how: the same rows and prompts, through torch or llama.cpp, give the same numbers.

A run keeps the rows in `held_out.jsonl`, so that it can be exported years later, on another machine, without its data.
"""

import itertools
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sft.data.token_cache import Prepared
from sft.data.tokenize import IGNORED
from sft.generation import batching
from sft.storage.atomic import write_text

ROWS = 32
"""Rows whose loss is compared. 32 rows of a few hundred tokens show a lost adapter at once and take seconds."""

TOKENS = 4096
"""Tokens of a padding-free micro-batch."""

AT_ONCE = 8
"""Prompts completed together: a token costs the time to read the weights, whether for one prompt or for eight."""

TOP = 8
"""How many of the likeliest tokens are kept at each step of a completion, to judge ties by."""


@dataclass
class HeldOutRow:
    """One row to measure on."""

    source: str
    """`held_out`, or `train` where nothing was held out."""
    input_ids: list[int]
    labels: list[int]
    """IGNORED where a token is no target."""
    prompt_length: int
    """Tokens before the last answer: the prompt that is completed."""
    question: str
    reference: str


@dataclass
class EvalResult:
    """What one model does on the rows."""

    loss: float
    """Mean over the target tokens of all rows, in nats."""
    row_losses: list[float]
    """The same for each row."""
    completions: list[list[int]]
    """Greedy completions of the first prompts, as token ids, with the end mark where it was reached."""
    finished: list[bool]
    """Whether each completion ended by itself."""
    tops: list[list[dict[int, float]]] = field(default_factory=list)
    """For each completion and each of its tokens: the likeliest tokens and their log probabilities."""

    @property
    def eos_share(self) -> float:
        """Share of the completions that ended by themselves."""
        return sum(self.finished) / len(self.finished) if self.finished else 0.0


def write_rows(folder: Path, prepared: Prepared) -> None:
    """Keep the first ROWS held-out rows (training rows where nothing is held out) in held_out.jsonl."""
    rows, source = (prepared.eval, "held_out") if prepared.eval is not None else (prepared.train, "train")
    names = [f.name for f in fields(HeldOutRow) if f.name != "source"]
    lines = [
        json.dumps({"source": source, **{name: row[name] for name in names}}, ensure_ascii=False)
        for row in rows.select(range(min(ROWS, len(rows))))
    ]
    write_text(folder / "held_out.jsonl", "\n".join(lines) + "\n")


def read_rows(folder: Path) -> list[HeldOutRow]:
    """The rows that `write_rows` kept; OSError or ValueError where the file is missing or damaged."""
    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [HeldOutRow(**json.loads(line)) for line in lines]


def prompt_of(row: HeldOutRow) -> list[int]:
    """The ids that are completed; a text without a question is continued from its first half, as in samples.jsonl."""
    return row.input_ids[: row.prompt_length if row.question else max(1, len(row.input_ids) // 2)]


def row_losses(model: Any, rows: list[HeldOutRow]) -> tuple[float, list[float]]:
    """(mean over all target tokens, mean of each row), in nats; one row at a time, so that nothing is padded.

    The model may be in any mode; it is evaluated without gradients and left in the mode it was in.
    """
    import torch

    was_training = model.training
    model.eval()
    sums, counts = [], []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.input_ids], device=model.device)
            labels = torch.tensor([row.labels], device=model.device)
            count = int((labels[:, 1:] != IGNORED).sum())
            sums.append(float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss) * count)
            counts.append(count)
    model.train(was_training)
    return sum(sums) / sum(counts), [s / n for s, n in zip(sums, counts, strict=True)]


def padding_free_loss(model: Any, rows: list[HeldOutRow], collate: Any) -> float:
    """The mean of `row_losses` by padding-free micro-batches of many rows: seconds less for a large model on a GPU.

    `collate` is a PaddingFreeCollator, and `model` one that takes its batches. Raises torch.OutOfMemoryError where a single row
    does not fit.
    """
    import torch

    was_training, most = model.training, TOKENS
    model.eval()
    total, targets, waiting = 0.0, 0, list(rows)
    with torch.no_grad():
        while waiting:
            ends = itertools.accumulate(len(row.input_ids) for row in waiting)
            count = max(1, sum(end <= most for end in ends))
            part = waiting[:count]
            inputs = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in part])
            inputs = {key: x.to(model.device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
            try:
                loss = float(model(**inputs).loss)
            except torch.OutOfMemoryError as error:
                if count == 1:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what has to be freed
                most //= 2
                continue
            total, targets = total + loss * len(inputs["targets"]), targets + len(inputs["targets"])
            waiting = waiting[count:]
    model.train(was_training)
    return total / targets


def measure_torch(
    model: Any, rows: list[HeldOutRow], prompts: int, max_new_tokens: int, stop_ids: list[int], pad: int
) -> EvalResult:
    """Losses on all rows and greedy completions of the prompts of the first `prompts` of them, up to AT_ONCE at a time."""
    loss, losses = row_losses(model, rows)
    result = EvalResult(loss, losses, [], [])
    model.eval()
    wanted = [prompt_of(row) for row in rows[:prompts]]
    for part in batching.grouped(wanted, max_new_tokens, AT_ONCE):
        for completion, tops in _complete(model, part, max_new_tokens, stop_ids, pad):
            result.completions.append(completion)
            result.finished.append(bool(completion) and completion[-1] in stop_ids)
            result.tops.append(tops)
    return result


def _complete(
    model: Any, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int], pad: int
) -> Iterator[tuple[list[int], list[dict[int, float]]]]:
    """(completion, likeliest tokens of each step) of each prompt."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    ids, mask = batching.padded(prompts, pad, model.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=pad, use_cache=True
    )
    steps = []

    def note(seen: Any, logits: Any) -> Any:  # and not all logits of all steps: half a gigabyte for a large vocabulary
        best = torch.log_softmax(logits.float(), -1).topk(TOP)
        steps.append((best.indices.tolist(), best.values.tolist()))
        return logits

    with torch.no_grad(), batching.plain(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([note])
        )
    for row, completion in enumerate(output[:, ids.shape[1] :].tolist()):
        completion = batching.until_end(completion, stop_ids)
        yield completion, [dict(zip(best[row], values[row], strict=True)) for best, values in steps[: len(completion)]]
