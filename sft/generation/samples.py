"""Completions of fixed prompts, generated greedily, so that what the model learns can be read and not only plotted."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sft.config.schema import Backend, Settings, Shape
from sft.data.prompts import prompt_ids
from sft.data.token_cache import Prepared
from sft.distributed import strategy
from sft.errors import first_line
from sft.generation import batching, decoding
from sft.model.structure import base_of

log = logging.getLogger(__name__)


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
    check_stop: Callable[[], None] = lambda: None,
) -> list[dict]:
    """One greedy completion a prompt, as the lines of samples.jsonl. Weights, mode and random state are left as they were.

    Prompts are completed `at_once` many at a time, padded on the left. `check_stop` is called at every token and raises where
    the completions have to be given up.
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
    count = at_once(settings)
    fits = count > 1 and not strategy.shards(settings) and decoding.fits(base_of(model))

    def complete(part: list[list[int]]) -> list[list[int]]:
        if fits:
            try:
                return decoding.greedy(base_of(model), part, stop_ids, config.max_new_tokens, check_stop)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what CUDA says where a step cannot be captured
                log.debug("completions are not captured: %s", first_line(error))
        ids, mask = batching.padded(part, tokenizer.pad_token_id, model.device)
        return model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=[check]
        )[:, ids.shape[1] :].tolist()  # fmt: skip

    with inference_mode(model, settings), batching.plain(model):
        parts = batching.grouped([prompt.input_ids for prompt in prompts], config.max_new_tokens, count)
        completions = [completion for part in parts for completion in complete(part)]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the completions' keys and values would leave the memory in pieces
    return [_line(prompt, ids, tokenizer, stop_ids, step) for prompt, ids in zip(prompts, completions, strict=True)]


def _line(prompt: Prompt, completion: list[int], tokenizer: Any, stop_ids: set[int], step: int) -> dict:
    """A line of samples.jsonl."""
    completion = batching.until_end(completion, stop_ids)
    return {
        "step": step,
        "index": prompt.index,
        "source": prompt.source,
        "prompt": tokenizer.decode(prompt.input_ids),
        "question": prompt.question,
        "reference": prompt.reference,
        "completion": tokenizer.decode(completion),
        "completion_ids": completion,
        "finish": "eos" if completion and completion[-1] in stop_ids else "length",
    }


def at_once(settings: Settings) -> int:
    """Prompts that are completed together: four cost little more than one. Unsloth's inference is its own and gets one."""
    return 1 if settings.model.backend == Backend.unsloth else 8


def eos_share(lines: list[dict]) -> float | None:
    """Share of the completions that ended with an end mark and not at `samples.max_new_tokens`."""
    return round(sum(line["finish"] == "eos" for line in lines) / len(lines), 4) if lines else None


@contextlib.contextmanager
def inference_mode(model: Any, settings: Settings) -> Iterator[None]:
    """Inference mode inside the block; afterwards the mode and the random state are what they were before."""
    import torch

    from sft.model.backend import unsloth_checkpointing

    was_training, unsloth = model.training, settings.model.backend == Backend.unsloth
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # Nothing is compiled for the lengths of completions.
    with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if unsloth:
            from unsloth import FastLanguageModel

            FastLanguageModel.for_inference(model)
        model.eval()
        try:
            yield
        finally:
            if unsloth:
                # The same kind of checkpointing as before, else the next step recompiles and needs more memory.
                kind = unsloth_checkpointing(settings.trainer.gradient_checkpointing)
                FastLanguageModel.for_training(model, use_gradient_checkpointing=kind)
            model.train(was_training)
