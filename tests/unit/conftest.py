"""Shared by the unit tests: the real SmolLM2 tokenizer, and copies of it with another chat template or BOS."""

import copy
import functools

import pytest

from sft.config.schema import Settings
from sft.model import tokenizer as model_tokenizer


@pytest.fixture(scope="session")
def loaded_tokenizer():
    """SmolLM2's tokenizer and stop tokens, as a run loads them. Not to be changed: take `make_tokenizer`."""
    return model_tokenizer.load_tokenizer(Settings().model)


@pytest.fixture(scope="session")
def tokenizer(loaded_tokenizer):
    return loaded_tokenizer[0]


@pytest.fixture(scope="session")
def make_tokenizer(tokenizer):
    """`make_tokenizer(chat_template, bos=..., adds_bos=True, special=(...,), eos=..., pad=...)`: a changed copy.

    It is shared by all who ask for the same.
    """
    from tokenizers.processors import TemplateProcessing

    @functools.cache  # a copy takes half a second
    def make(chat_template=None, bos=None, adds_bos=False, special=(), eos=None, pad=None):
        made = copy.deepcopy(tokenizer)
        made.chat_template = chat_template
        made.add_special_tokens({"additional_special_tokens": list(special)})
        for name, value in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)):
            if value:
                made.add_special_tokens({name: value})
        if adds_bos:
            made.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{made.bos_token} $A", special_tokens=[(made.bos_token, made.bos_token_id)]
            )
        return made

    return make
