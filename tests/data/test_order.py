"""The order of held-out rows: its beginnings stand for all of them."""

import pytest
from datasets import Dataset

from sft.data.order import LOOKED_AT, spread, spread_first
from sft.data.prepare import prepare
from sft.data.token_cache import token_counts
from sft.generation.samples import choose_prompts
from tests.conftest import make_settings


@pytest.mark.parametrize("count", [2, 4, 8, 12])
def test_any_beginning_has_both_scripts_in_turn(count):
    rows = [("Why?", n) for n in range(20)] + [("为什么？", n) for n in range(6)]
    chosen = spread(rows)[:count]
    assert sum(at < 20 for at in chosen) == count // 2


def test_lengths_of_all_kinds_come_early_and_no_row_is_lost():
    order = spread([("x", n) for n in range(31)])
    assert order[:3] == [15, 7, 23] and sorted(order) == [*range(31)]
    assert spread([]) == [] and spread([("日", 1)]) == [0]


def test_the_first_rows_are_moved_with_all_they_have_and_the_others_stay():
    texts = ["a" * n if n % 3 else "字" * n for n in range(1, 41)]
    rows = Dataset.from_dict({"question": texts, "reference": [""] * 40, "input_ids": [[7] * n for n in range(1, 41)]})
    found = spread_first(rows)
    assert [len(text) for text in found["question"]] == token_counts(found).tolist(), "the table is in the new order too"
    assert (
        sorted(found["question"][:LOOKED_AT]) == sorted(texts[:LOOKED_AT])
        and found["question"][LOOKED_AT:] == texts[LOOKED_AT:]
    )
    assert len({"字" in text for text in found["question"][:2]}) == 2
    assert spread_first(rows.select(range(1))).to_dict() == rows.select(range(1)).to_dict()


def test_the_samples_of_the_default_run_are_four_chinese_and_four_english_questions(loaded_tokenizer):
    settings = make_settings()
    prompts = choose_prompts(prepare(settings, *loaded_tokenizer), settings, loaded_tokenizer[0])
    chinese = ["\u4e00" <= prompt.question[0] <= "\u9fff" or prompt.question[0] == "“" for prompt in prompts]
    assert len(prompts) == 8 and sum(chinese) == 4
    assert {prompt.source for prompt in prompts} == {"held_out"}
