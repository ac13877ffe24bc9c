"""The tokenizer, its chat template, and the tokens that end a completion."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.schema import ModelSettings
from sft.errors import Refusal, first_line, refuse
from sft.model import chat_template
from sft.model.files import INDEX, check_model_files
from sft.model.hub import locate, refusing_failures

# Tokens that model makers reserve and never train; the first one present becomes the padding of a tokenizer without any.
UNUSED_TOKENS = ["<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>"]


def load_tokenizer(model: ModelSettings, chat_template_kwargs: dict[str, Any] | None = None) -> tuple[Any, set[int]]:
    """The tokenizer with a padding token that is not its EOS, and the ids that end a completion.

    `chat_template_kwargs` are set at the head of its chat template, which from here on is one text. Raises Refusal if it cannot
    be reached, has no EOS, or gives no character offsets, and for model files that cannot be believed (sft/model/files.py).
    """
    from transformers import AutoTokenizer, GenerationConfig

    where, _ = locate(model, weights=False)
    problems = check_model_files(_files_of(where, model), model)
    if problems:
        raise Refusal(problems)
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    fix = "bring its files back as their maker wrote them"
    with _refusing_damage(f"model.name={model.name}", fix), refusing_failures(model):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if not tokenizer.is_fast:
        why, fix = (
            "Its tokenizer is a slow one, which cannot say which token stands where.",
            "take a model with a tokenizer.json",
        )
        raise refuse(f"model.name={model.name}", why, fix)
    template = chat_template.choose_template(tokenizer.chat_template, model.chat_template, model.name)
    tokenizer.chat_template = chat_template.set_variables(template, chat_template_kwargs or {}, model.name)
    if tokenizer.eos_token_id is None:
        why = "Its tokenizer has no end-of-text token, so the model could never stop."
        raise refuse(
            f"model.name={model.name}", why, "in a local copy of the model, name one as eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in UNUSED_TOKENS if t in known and t != tokenizer.eos_token), tokenizer.eos_token)
    tokenizer.padding_side = "right"
    stop_ids = {tokenizer.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(where, revision=model.revision).eos_token_id
        stop_ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
    except OSError:
        pass  # a model without generation settings stops at its tokenizer's EOS
    return tokenizer, stop_ids


def read_tokenizer(weights: Path, consent: bool, stops: list[str]) -> tuple[Any, list[int]]:
    """The tokenizer that a run kept beside its weights, and the ids of `stops`, the tokens that end its completions.

    Raises Refusal if its files cannot be read or do not hold these tokens.
    """
    from transformers import AutoTokenizer

    fix = "bring the files of the folder back as the run wrote them"
    with _refusing_damage(str(weights), fix):
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=consent)
        known = tokenizer.get_vocab()
    if lost := [stop for stop in stops if stop not in known]:
        raise refuse(str(weights), f"The tokenizer in it has no token {lost[0]}, which ends answers.", fix)
    return tokenizer, sorted(known[stop] for stop in stops)


@contextlib.contextmanager
def _refusing_damage(what: str, fix: str) -> Iterator[None]:
    """Turn what reading a tokenizer's files raises into a Refusal."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # the library that reads tokenizer.json raises nothing narrower
        raise refuse(what, f"The tokenizer in it cannot be read: {first_line(error)}", fix) from error


def _files_of(where: str, model: ModelSettings) -> Path:
    """The folder of a model's files: a local one, or the hub's copy, whose small files are fetched for this."""
    from huggingface_hub import hf_hub_download

    folder = Path(where)
    for name in () if folder.is_dir() else (INDEX, "generation_config.json", "config.json"):
        with contextlib.suppress(Exception):  # what cannot be had is reported by loading, in more words
            folder = Path(hf_hub_download(where, name, revision=model.revision)).parent
    return folder
