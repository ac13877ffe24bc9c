"""Regular expressions of a user: each is compiled in silence or refused, wherever it is typed."""

import pytest

from sft.config import rules
from sft.config.patterns import compile_pattern, pattern_fault
from sft.config.schema import MethodName, Settings

GOOD = ["[[a]", "[+--b]", "[a||b]", "(x)", "a{2}"]  # the first three are warned of by `re`
BAD = ["(x", "[", "*", "a{99999999999999}", "(?P<a>x)(?P<a>y)", "(" * 20_000 + ")" * 20_000, "a(?i)", "\\8"]


def _filtered(made: Settings, pattern: str) -> None:
    made.dataset.keep = {"output": pattern}
    made.dataset.drop = {"output": pattern}


def _layers(made: Settings, pattern: str) -> None:
    made.lora.target_modules = [pattern]


def _excluded(made: Settings, pattern: str) -> None:
    made.lora.extra = {"exclude_modules": pattern}


def _ranks(made: Settings, pattern: str) -> None:
    made.lora.extra = {"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 4}}


def _rewarded(made: Settings, pattern: str) -> None:
    made.method.name = MethodName.grpo
    made.method.reward_funcs = ["regex"]
    made.method.reward_options = {"regex": {"pattern": pattern}}


PLACES = [_filtered, _layers, _excluded, _ranks, _rewarded]


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.__name__.strip("_"))
def test_a_pattern_is_taken_or_refused(place):
    def refused(pattern: str) -> bool:
        made = Settings()
        place(made, pattern)
        return any(p.why.startswith("Not a regular expression") for p in rules.check_settings(made, hardware=False))

    assert not [pattern for pattern in GOOD if refused(pattern)]
    assert not [pattern[:20] for pattern in BAD if not refused(pattern)]


def test_pattern_fault():
    assert not any(map(pattern_fault, GOOD)) and all(map(pattern_fault, BAD))
    assert compile_pattern("[[a]").fullmatch("[")
