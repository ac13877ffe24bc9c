"""Answers to fixed prompts, generated greedily, so that what the model learns can be read and not only plotted."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sft.data import Prepared
from sft.render import prompt_ids
from sft.settings import Settings, Shape


@dataclass
class Prompt:
    """One fixed prompt."""

    index: int
    source: str
    """`held_out`, `train` (where nothing is held out) or `config`."""
    input_ids: list[int]
    question: str
    reference: str | None


def choose_prompts(data: Prepared, settings: Settings, tokenizer) -> list[Prompt]:
    """The first held-out rows up to their last answer, then the questions of `samples.prompts`."""
    prompts = []
    rows, source = (data.eval, "held_out") if data.eval is not None else (data.train, "train")
    for row in rows.select(range(min(settings.samples.num_held_out, len(rows)))):
        # A text without a question is continued from its first half.
        length = row["prompt_length"] if row["question"] else max(1, len(row["input_ids"]) // 2)
        prompts.append(Prompt(len(prompts), source, row["input_ids"][:length], row["question"], row["reference"]))
    for question in settings.samples.prompts:
        ids = prompt_ids(question, settings, Shape(data.facts["shape"]), tokenizer)
        prompts.append(Prompt(len(prompts), "config", ids, question, None))
    return prompts


def generate(
    model,
    tokenizer,
    prompts: list[Prompt],
    settings: Settings,
    stop_ids: set[int],
    step: int,
    backend: str,
    check_stop: Callable[[], None] = lambda: None,
) -> list[dict]:
    """One greedy answer a prompt, as the lines of samples.jsonl. Leaves weights, mode and random state as they were.

    Prompts go one by one: padding would change the numbers, and an export is compared with these answers.
    `check_stop` is called at every token and raises where the answers have to be given up.
    """
    import torch
    from transformers import GenerationConfig

    def check(ids: Any, scores: Any, **kwargs: Any) -> Any:
        check_stop()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.samples.max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    lines = []
    with _answering(model, settings, backend):
        for prompt in prompts:
            ids = torch.tensor([prompt.input_ids], device=model.device)
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[check]
            )
            answer = output[0, ids.shape[1] :].tolist()
            lines.append(
                {
                    "step": step,
                    "index": prompt.index,
                    "source": prompt.source,
                    "prompt": tokenizer.decode(prompt.input_ids),
                    "question": prompt.question,
                    "reference": prompt.reference,
                    "completion": tokenizer.decode(answer),
                    "finish": "eos" if answer and answer[-1] in stop_ids else "length",
                }
            )
    return lines


def eos_share(lines: list[dict]) -> float | None:
    """Share of the answers that ended with an end mark and not at `samples.max_new_tokens`."""
    return round(sum(line["finish"] == "eos" for line in lines) / len(lines), 4) if lines else None


@contextlib.contextmanager
def _answering(model: Any, settings: Settings, backend: str) -> Iterator[None]:
    """Inference mode inside the block; afterwards the mode and the random state are what they were before."""
    import torch

    from sft.models import unsloth_checkpointing

    was_training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # Nothing is compiled for the lengths of answers.
    with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if backend == "unsloth":
            from unsloth import FastLanguageModel

            FastLanguageModel.for_inference(model)
        model.eval()
        try:
            yield
        finally:
            if backend == "unsloth":
                # The same kind of checkpointing as before, else the next step recompiles and needs more memory.
                FastLanguageModel.for_training(model, use_gradient_checkpointing=unsloth_checkpointing(settings))
            model.train(was_training)
            if devices:
                torch.cuda.empty_cache()  # the answers' key/value caches would leave the memory in pieces
