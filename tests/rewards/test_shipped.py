"""What the shipped rewards give, case by case, and that each is pure, in [0, 1] and never raises."""

import inspect
import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.config.reward_names import JSON_TYPES, SHIPPED
from sft.config.schema import MethodName, MethodSettings
from sft.rewards import load_rewards
from sft.rewards.shipped import FUNCTIONS, TYPES, after_thoughts, last_number


def score(name: str, completion: str, answer: str = "", finish: str = "ended", **options) -> float:
    method = MethodSettings(MethodName.grpo, reward_funcs=[name], reward_options={name: options} if options else {})
    (reward,) = load_rewards(method)
    (value,) = reward.score([completion], [{"answer": answer, "finish": finish}])
    return value


NUMBERS = [
    ("22", "22"), ("It is 22.", "22"), ("7 + 15 = 22", "22"), ("#### 72", "72"), ("**72**", "72"), (r"\boxed{72}", "72"),
    ("1,000", "1000"), ("1,234,567.5", "1234567.5"), ("1{,}000", "1000"), ("3.0", "3"), (".5", "0.5"), ("1e3", "1000"),
    ("-5", "-5"), ("x=-5", "-5"), ("−5", "-5"), ("负五", "-5"), ("负5", "-5"), ("3-5", "5"), ("10 - 3", "3"), ("$-5", "-5"),
    ("-$5", "-5"), ("$1,000", "1000"), ("50%", "50"), ("5th", "5"), ("10²", "10"), ("1, 2, 3", "3"), ("1,2,3", "3"),
    ("２２", "22"), ("－２２", "-22"), ("１，０００", "1000"), ("答案是22，没错。", "22"), ("答案是二十二", "22"),
    ("一千零五", "1005"), ("十二", "12"), ("一亿二千万", "120000000"), ("二零二六", "2026"), ("两百", "200"),
    ("一共22个", "22"), ("22个，一共", "22"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_the_last_number_of_a_text_is_read_as_people_read_it(text, value):
    assert last_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "?", "²", "-", "."])
def test_a_text_without_a_number_has_none(text):
    assert last_number(text) is None


SCORES = [
    ("number", "The sum is 22.", "22", 1.0), ("number", "22 or 23", "22", 0.0), ("number", "none", "22", 0.0),
    ("number", "1000.0", "It is 9*9.\n#### 1,000", 1.0), ("number", "none", "none", 0.0), ("number", "", "", 0.0),
    ("number", "二十二", "22", 1.0), ("number", "122", "22", 0.0), ("number", "-22", "22", 0.0),
    ("exact", " Paris\n", "Paris", 1.0), ("exact", "New  York", "New\nYork", 1.0), ("exact", "paris", "Paris", 0.0),
    ("exact", "", "", 0.0), ("exact", "北京", "北京", 1.0),
    ("contains", "It is Paris, of course.", "Paris", 1.0), ("contains", "Parisian", "Paris", 0.0), ("contains", "15", "5", 0.0),
    ("contains", "答案是北京市。", "北京", 1.0), ("contains", "x", "", 0.0), ("contains", "a (b) c", "(b)", 1.0),
    ("length", "word " * 40, "", 1.0), ("length", "word " * 60, "", 0.5), ("length", "word " * 80, "", 0.0),
    ("length", "word " * 200, "", 0.0), ("length", "", "", 1.0), ("length", "字" * 60, "", 0.5),
    ("repetition", "one two three four", "", 1.0), ("repetition", "a a a a a", "", 1 / 3), ("repetition", "", "", 1.0),
    ("repetition", "好好好好", "", 0.5), ("repetition", "A b c a B c", "", 0.75),
    ("format", "<think>so</think>22", "", 1.0), ("format", "\n<think>\n\n</think>\n\n22", "", 1.0), ("format", "22", "", 0.0),
    ("format", "<think>so</think> ", "", 0.0), ("format", "a<think>so</think>22", "", 0.0), ("format", "<think>so", "", 0.0),
    ("format", "<think>a</think><think>b</think>22", "", 0.0), ("format", "so</think>22", "", 0.0),
    ("json_schema", '{"a": 1}', "", 1.0), ("json_schema", " [1, 2] ", "", 1.0), ("json_schema", "```json\n1\n```", "", 0.0),
    ("json_schema", "NaN", "", 0.0), ("json_schema", "{'a': 1}", "", 0.0), ("json_schema", "", "", 0.0),
    ("json_schema", "[" * 100_000, "", 0.0),
    ("number", "<think>7 + 15 = 22</think>\n\n22", "22", 1.0), ("number", "<think>7 + 15 = 22", "22", 0.0),
    ("exact", "<think>7 + 15</think>\n\n22", "22", 1.0), ("exact", "22", "<think>7 + 15</think>\n\n22", 1.0),
    ("contains", "<think>Paris?</think>Rome", "Paris", 0.0), ("json_schema", "<think>{</think>{}", "", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "completion", "answer", "value"), SCORES, ids=lambda value: str(value)[:30])
def test_a_reward_without_options_gives(name, completion, answer, value):
    assert score(name, completion, answer) == pytest.approx(value)


def test_the_reward_of_an_end_is_for_completions_that_ended_by_themselves():
    assert score("ends", "22", finish="ended") == 1 and score("ends", "22", finish="length") == 0


@pytest.mark.parametrize(
    ("name", "completion", "options", "value"),
    [
        ("contains", "It is Rome.", {"text": "Rome"}, 1.0),
        ("contains", "It is Paris.", {"text": "Rome"}, 0.0),
        ("regex", "22", {"pattern": r"^\d+$"}, 1.0),
        ("regex", "It is 22", {"pattern": r"^\d+$"}, 0.0),
        ("length", "a b c", {"words": 2}, 0.5),
        ("repetition", "a b a b", {"n": 2}, 2 / 3),
    ],
)
def test_a_reward_with_options_gives(name, completion, options, value):
    assert score(name, completion, "Paris", **options) == pytest.approx(value)


PERSON = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 1]}},
    },
}


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ({"name": "A"}, 1), ({"name": "A", "age": 3, "tags": ["a", 1]}, 1), ({"name": "A", "age": 3.0}, 1),
        ({"name": "A", "other": None}, 1), ({}, 0), ([], 0), ({"name": 1}, 0), ({"name": "A", "age": 3.5}, 0),
        ({"name": "A", "age": True}, 0), ({"name": "A", "tags": ["c"]}, 0), ({"name": "A", "tags": [True]}, 0),
    ],
)  # fmt: skip
def test_json_fits_a_schema(value, fits):
    assert score("json_schema", json.dumps(value), **PERSON) == fits


def test_the_rules_know_the_rewards_their_options_and_the_types_of_json():
    assert FUNCTIONS.keys() == SHIPPED.keys() and set(TYPES) == set(JSON_TYPES)
    for name, function in FUNCTIONS.items():
        parameters = list(inspect.signature(function).parameters.values())[2:]
        named = {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
        assert named == (set(SHIPPED[name]) if name != "json_schema" else set())


OPTIONS = {"regex": {"pattern": r"\d"}, "json_schema": PERSON}
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("0123456789０９٣,.-−+$eE负二十百千万亿零 {}[]\"':truefalsnull<think></think>\n", max_size=40),
)


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=150, deadline=None)
@given(completion=TEXTS, answer=TEXTS, finish=st.sampled_from(["ended", "length"]))
def test_every_reward_is_pure_in_0_to_1_and_never_raises(name, completion, answer, finish):
    row = {"answer": answer, "finish": finish}
    options = OPTIONS.get(name, {})
    value = FUNCTIONS[name](completion, row, **options)
    assert type(value) is float and 0 <= value <= 1
    assert value == FUNCTIONS[name](completion, row, **options) and row == {"answer": answer, "finish": finish}


@settings(max_examples=150, deadline=None)
@given(answer=TEXTS)
def test_an_answer_earns_its_own_full_reward(answer):
    row = {"answer": answer, "finish": "ended"}
    meant = after_thoughts(answer)
    assert FUNCTIONS["number"](answer, row) == (last_number(meant) is not None)
    assert FUNCTIONS["exact"](answer, row) == FUNCTIONS["contains"](answer, row) == bool(meant.strip())
