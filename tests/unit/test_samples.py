"""Answers to several prompts at once are those to each alone."""

import pytest
import torch

from sft import models, samples
from sft.samples import Prompt
from tests.conftest import SMALL, make_settings


@pytest.fixture(scope="module")
def tiny():
    settings = make_settings(*SMALL, "samples.max_new_tokens=12")
    tokenizer, stop_ids = models.load_tokenizer(settings.model)
    return settings, tokenizer, stop_ids, models.load_model(settings, "transformers")[0]


def answers(tiny, stop_ids, at_once, monkeypatch):
    settings, tokenizer, _, model = tiny
    monkeypatch.setattr(samples, "at_once", lambda device, backend: at_once)
    prompts = [Prompt(i, "config", list(range(20 * i + 5, 20 * i + 7 + 3 * i)), f"q{i}", None) for i in range(5)]
    return samples.generate(model, tokenizer, prompts, settings, stop_ids, 0, "transformers")


@pytest.mark.parametrize("at_once", [2, 8])
def test_answers_at_once_are_those_one_by_one(tiny, monkeypatch, at_once):
    alone = answers(tiny, tiny[2], 1, monkeypatch)
    assert answers(tiny, tiny[2], at_once, monkeypatch) == alone
    assert [line["index"] for line in alone] == list(range(5)) and {line["finish"] for line in alone} == {"length"}


def test_an_answer_that_ends_before_the_others_is_cut_at_its_end(tiny, monkeypatch):
    _, tokenizer, _, model = tiny
    ids = torch.tensor([list(range(25, 30))])
    with torch.no_grad():
        said = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    stop = next(token for i, token in enumerate(said) if token not in said[:i] and i >= 2)  # the second prompt's own
    alone, together = (answers(tiny, {stop}, count, monkeypatch) for count in (1, 8))
    assert together == alone and alone[1]["finish"] == "eos"
    assert alone[1]["completion"] == tokenizer.decode(said[: said.index(stop) + 1])
    assert any(line["finish"] == "length" for line in alone), "else nothing had to be padded"
