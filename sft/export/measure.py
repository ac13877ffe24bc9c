"""What an export is measured on, and how: the same rows and prompts, through torch or llama.cpp, give the same numbers.

A run keeps the rows in `held_out.jsonl`, so that it can be exported years later, on another machine, without its data.
"""

import itertools
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
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
    rejected_ids: list[int] = field(default_factory=list)
    """Of a pair, whose chosen row is `input_ids`: the rejected row."""
    rejected_labels: list[int] = field(default_factory=list)
    reference_log_probs: list[float] = field(default_factory=list)
    """Of a pair: the summed log probabilities of the chosen and of the rejected row by the weights that the run began with."""
    trained_log_probs: list[float] = field(default_factory=list)
    """The same by the weights that the run keeps, as they were in its memory."""
    row_number: int = 0
    """Of a prompt that is rewarded, whose `labels` are a greedy completion by the weights that the run keeps: its number in the
    data.
    """
    columns: str = ""
    """Its raw row, as JSON."""
    rewards: list[float] = field(default_factory=list)
    """What the completion is rewarded with by each function of `method.reward_funcs`."""

    @property
    def entry(self) -> dict[str, Any]:
        """What a reward is given of the row, by the names of a prepared one."""
        return {"row": self.row_number, "columns": self.columns, "question": self.question, "reference": self.reference}

    @property
    def targets(self) -> list[int]:
        """Target tokens of the row; of a pair those of the chosen and of the rejected one."""
        both = [self.labels, self.rejected_labels] if self.rejected_labels else [self.labels]
        return [sum(label != IGNORED for label in labels[1:]) for labels in both]


OPTIONAL = ("rejected_ids", "rejected_labels", "reference_log_probs", "trained_log_probs", "row_number", "columns", "rewards")
"""What only pairs or rewarded prompts have of a HeldOutRow."""


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
    rejected_losses: list[float] = field(default_factory=list)
    """Of pairs: the loss of each rejected row."""
    rewards: list[list[float]] = field(default_factory=list)
    """The rewards of each completion, by each function of `method.reward_funcs`; empty where they are not known."""

    @property
    def eos_share(self) -> float:
        """Share of the completions that ended by themselves."""
        return sum(self.finished) / len(self.finished) if self.finished else 0.0


def write_rows(folder: Path, prepared: Prepared) -> None:
    """Keep the first ROWS held-out rows (training rows where nothing is held out) in held_out.jsonl."""
    rows, source = (prepared.eval, "held_out") if prepared.eval is not None else (prepared.train, "train")
    names = [f.name for f in fields(HeldOutRow) if f.name in rows.column_names]
    kept = rows.select(range(min(ROWS, len(rows))))
    none = {} if "labels" in names else {"labels": []}
    found = [HeldOutRow(source, **none, **{name: row[name] for name in names}) for row in kept]
    if "columns" in names:  # prompts that are rewarded
        found = [replace(one, row_number=row["row"]) for one, row in zip(found, kept, strict=True)]
    _write(folder, found)


def write_completions(folder: Path, source: str, completions: list[tuple[dict[str, Any], list[int], list[float]]]) -> None:
    """Keep (prepared row, greedy completion, its rewards) in held_out.jsonl, to measure the completions on."""
    rows = [HeldOutRow(source, entry["input_ids"], [], len(entry["input_ids"]), entry["question"], entry["reference"],
                       row_number=entry["row"], columns=entry["columns"], rewards=rewards)
            for entry, _, rewards in completions]  # fmt: skip
    _write(folder, [completed(row, ids) for row, (_, ids, _) in zip(rows, completions, strict=True)])


def completed(row: HeldOutRow, completion: list[int]) -> HeldOutRow:
    """The row of a prompt with a completion as its targets."""
    prompt = row.input_ids[: row.prompt_length]
    return replace(row, input_ids=prompt + completion, labels=[IGNORED] * len(prompt) + completion)


def completion_of(row: HeldOutRow) -> list[int]:
    """The completion that `completed` gave a row."""
    return [label for label in row.labels if label != IGNORED]


def note_log_probs(folder: Path, name: str, log_probs: list[list[float]]) -> None:
    """Keep the log probabilities of both rows of the first pairs, [pairs, 2], beside them: `reference_log_probs`, or
    `trained_log_probs`.
    """
    rows = read_rows(folder)
    _write(folder, [replace(row, **{name: both}) for row, both in zip(rows, log_probs, strict=False)])


def _write(folder: Path, rows: list[HeldOutRow]) -> None:
    found = [{name: value for name, value in vars(row).items() if value or name not in OPTIONAL} for row in rows]
    write_text(folder / "held_out.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found))


def read_rows(folder: Path) -> list[HeldOutRow]:
    """The rows that `write_rows` kept; OSError or ValueError where the file is missing or damaged."""
    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [HeldOutRow(**json.loads(line)) for line in lines]


def prompt_of(row: HeldOutRow) -> list[int]:
    """The ids that are completed; a text without a question is continued from its first half, as in samples.jsonl."""
    known = row.question or row.columns
    return row.input_ids[: row.prompt_length if known else max(1, len(row.input_ids) // 2)]


def rejected_rows(rows: list[HeldOutRow]) -> list[HeldOutRow]:
    """The rejected rows of pairs; empty where there are none."""
    if not all(row.rejected_ids for row in rows):
        return []
    return [HeldOutRow(row.source, row.rejected_ids, row.rejected_labels, 0, row.question, "") for row in rows]


def log_probs_of(rows: list[HeldOutRow], found: EvalResult) -> list[list[float]]:
    """The summed log probabilities of both rows of each pair by what a model does, [pairs, 2]; empty without pairs."""
    both = zip(rows, found.row_losses, found.rejected_losses, strict=False)
    return [[-loss * count for loss, count in zip(losses, row.targets, strict=True)] for row, *losses in both]


def margins(rows: list[HeldOutRow], log_probs: list[list[float]]) -> list[float]:
    """How much more the chosen row of each pair gained than the rejected one, in nats, since the run began; empty where that
    is not known of each.
    """
    if not log_probs or not all(row.reference_log_probs and both for row, both in zip(rows, log_probs, strict=True)):
        return []
    before = [row.reference_log_probs for row in rows]
    return [now[0] - now[1] - (then[0] - then[1]) for now, then in zip(log_probs, before, strict=True)]


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


def known_loss(model: Any, folder: Path) -> float | None:
    """The loss of a model on the rows of held_out.jsonl; None where they have no targets yet, as prompts that are rewarded."""
    rows = [row for row in read_rows(folder) if row.targets[0]]
    return row_losses(model, rows)[0] if rows else None


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
    if rejected := rejected_rows(rows):
        result.rejected_losses = row_losses(model, rejected)[1]
    return _add_completions(result, model, rows[:prompts], max_new_tokens, stop_ids, pad)


def complete_rows(model: Any, rows: list[HeldOutRow], max_new_tokens: int, stop_ids: list[int], pad: int) -> list[HeldOutRow]:
    """Rows of prompts with the model's own greedy completions as their targets, where a run was cut before it kept any."""
    if any(row.labels for row in rows):
        return rows
    found = _add_completions(EvalResult(0.0, [], [], []), model, rows, max_new_tokens, stop_ids, pad)
    return [completed(row, ids) for row, ids in zip(rows, found.completions, strict=True)]


def _add_completions(
    result: EvalResult, model: Any, rows: list[HeldOutRow], max_new_tokens: int, stop_ids: list[int], pad: int
) -> EvalResult:
    model.eval()
    for part in batching.grouped([prompt_of(row) for row in rows], max_new_tokens, AT_ONCE):
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
