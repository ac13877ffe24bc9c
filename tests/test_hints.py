"""What is typed of a hint, and what turns a test of hints red."""

import pytest

from sft.errors import Problem
from tests.hints import hints_of, type_hints, typed, untyped


@pytest.mark.parametrize(
    ("fix", "hints", "rest"),
    [
        ("lora.r=8", [["lora.r=8"]], []),
        ("'dataset.template=\"Q: {a} A: {b}\"'   for one text", [['dataset.template="Q: {a} A: {b}"']], []),
        ("a.b=1   or   a.c=null   for none", [["a.b=1"], ["a.c=null"]], []),
        ("a.b=1 a.c=2   cuts\nraise a.b", [["a.b=1", "a.c=2"]], ["raise a.b"]),
        ("python train.py -m lora.r=8,16   for a sweep", [["-m", "lora.r=8,16"]], []),
        ("pip install x   or   a.b=1", [["a.b=1"]], ["pip install x"]),
        ("a.b=<column>\na.b=/path/to/x\na.b=...\na.b=x   for example", [], ["a.b=<column>", "a.b=/path/to/x", "a.b=..."]),
        ("write the user's own words", [], ["write the user's own words"]),
    ],
)
def test_overrides_are_typed_and_advice_is_not(fix, hints, rest):
    problem = Problem("x", "y", fix)
    assert hints_of(problem) == hints and untyped(problem)[: len(rest)] == rest


@pytest.mark.parametrize(
    ("argv", "what", "hint", "wanted"),
    [
        (["seed=1", "lora.rr=8"], "lora.rr=8", ["lora.r=8"], ["seed=1", "lora.r=8"]),
        (["+lora.r=8"], "lora.r=8", ["lora.r=8"], ["lora.r=8"]),
        (["--lora.r=8"], "--lora.r=8", ["lora.r=8"], ["lora.r=8"]),
        (["lora={r: 8}"], "lora={r: 8}", ["lora.r=8"], ["lora.r=8"]),
        (["lora.r=2", "seed=0"], "lora.r=2", ["seed=1"], ["lora.r=2", "seed=1"]),
        (["lora.r=8,16"], "lora.r=8,16", ["-m", "lora.r=8,16"], ["-m", "lora.r=8,16"]),
        (["seed=1", "resume=x"], "seed=1 resume=x", ["resume=x"], ["resume=x"]),
    ],
)
def test_a_hint_takes_the_place_of_what_it_mends(argv, what, hint, wanted):
    assert typed(argv, Problem(what, "y"), hint) == wanted


def test_a_hint_that_mends_nothing_or_is_refused_itself_is_found():
    problem = Problem("lora.r=0", "It has to be at least 1.", "lora.r=8")
    with pytest.raises(AssertionError, match="mends nothing"):
        type_hints(["lora.r=0"], [problem], lambda argv: [problem])
    with pytest.raises(AssertionError, match="is refused itself"):
        type_hints(["lora.r=0"], [problem], lambda argv: [Problem("lora.r=8", "It is odd.")])
    type_hints(["lora.r=0"], [problem], lambda argv: [Problem("lora.rank=8", "Another.")])
