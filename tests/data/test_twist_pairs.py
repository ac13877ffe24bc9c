"""The shipped preferences: what is left to learn from a pair is the sense, not its length, language or last mark."""

import json
import statistics
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest

from sft.config.schema import ASSETS


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").splitlines()]


def is_chinese(text: str) -> bool:
    """Whether most letters are Chinese characters."""
    letters = [char for char in text if char.isalpha()]
    return sum("\u4e00" <= char <= "\u9fff" for char in letters) > len(letters) / 2


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return read("twist_pairs.jsonl")


def test_every_twist_has_one_pair_with_its_own_words_in_its_place(pairs):
    assert len(pairs) == 260
    assert [set(pair) for pair in pairs] == [{"prompt", "chosen", "rejected"}] * 260
    assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [
        (row["instruction"], row["output"]) for row in read("twists.jsonl")
    ]


def test_every_rejected_answer_is_there_once(pairs):
    rejected = [pair["rejected"] for pair in pairs]
    assert all(text and text == text.strip() and "\n" not in text for text in rejected)
    assert len(set(rejected)) == 260
    assert not set(rejected) & {pair["chosen"] for pair in pairs}


def test_no_rejected_answer_is_a_template(pairs):
    openings = Counter(
        text[:4] if is_chinese(text) else " ".join(text.split()[:3]) for text in (pair["rejected"] for pair in pairs)
    )
    assert max(openings.values()) <= 3, openings.most_common(3)


def test_both_answers_are_in_the_language_of_the_prompt(pairs):
    languages = [{is_chinese(text) for text in pair.values()} for pair in pairs]
    assert all(len(language) == 1 for language in languages)
    assert languages.count({True}) == 130


def test_both_answers_use_the_marks_of_their_language(pairs):
    for text in (pair["rejected"] for pair in pairs):
        wide = {char for char in text if unicodedata.east_asian_width(char) in "FW" or char in "“”"}
        narrow = {char for char in text if char.isascii()}
        assert not (narrow if is_chinese(text) else wide), text


def test_both_answers_end_with_the_same_mark(pairs):
    assert [pair["rejected"][-1] for pair in pairs] == [pair["chosen"][-1] for pair in pairs]
    assert {pair["rejected"][-1] for pair in pairs} == {"。", "."}


@pytest.mark.parametrize("language", ["both", "chinese", "english"])
def test_length_does_not_tell_which_answer_is_chosen(pairs, tokenizer, language):
    wanted = [pair for pair in pairs if language == "both" or is_chinese(pair["prompt"]) == (language == "chinese")]
    lengths = [[len(tokenizer(pair[key])["input_ids"]) for key in ("chosen", "rejected")] for pair in wanted]
    ratios = [rejected / chosen for chosen, rejected in lengths]
    assert 0.9 <= statistics.median(ratios) <= 1.1
    assert sum(0.6 <= ratio <= 1.6 for ratio in ratios) >= 0.9 * len(ratios)
    assert 0.45 <= sum(ratio < 1 for ratio in ratios) / len(ratios) <= 0.55
    assert 0.45 <= sum(ratio > 1 for ratio in ratios) / len(ratios) <= 0.55


@pytest.mark.parametrize("chinese", [True, False])
def test_a_pair_is_about_its_own_question(pairs, chinese):
    """A rejected answer shares more words with its own question than with the next: it is not a mismatched answer."""

    def words(text: str) -> set[str]:
        if chinese:
            return {a + b for a, b in pairwise(text) if a.isalpha() and b.isalpha()}
        return {word for word in "".join(char if char.isalpha() else " " for char in text.lower()).split() if len(word) > 3}

    own = [pair for pair in pairs if is_chinese(pair["prompt"]) == chinese]
    shared = [len(words(pair["prompt"]) & words(pair["rejected"])) for pair in own]
    others = [len(words(other["prompt"]) & words(pair["rejected"])) for pair, other in zip(own, own[1:] + own[:1], strict=True)]
    assert sum(shared) > 5 * sum(others)
