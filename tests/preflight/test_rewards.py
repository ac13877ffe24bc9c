"""Rewards tried on the data's own answers and on an empty text: what is refused, warned of and told, all before the start."""

import json

import pytest

from sft.plan.plan import Plan
from sft.preflight.checks import examine
from sft.preflight.findings import Found
from tests.conftest import make_settings
from tests.hints import type_hints

SUMS = [{"instruction": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(24)]


@pytest.fixture
def look(tmp_path, monkeypatch):
    """`look(rows, source, "method.reward_funcs=[...]")`: what is found of rewards, with the user's functions in rewards.py."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)

    def examined(rows: list[dict], source: str, *overrides: str) -> Found:
        (tmp_path / "rewards.py").write_text(source, encoding="utf-8")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = (
            "method=grpo", "model=tiny_random", "tracking=none", "preflight.mode=skip", "dataset.path=rows.jsonl",
            "dataset.eval_fraction=0", "dataset.shuffle=false", *overrides,
        )  # fmt: skip
        return examine(make_settings(*words), tmp_path / "run", Plan(), {})

    return examined


def lines_of(found: Found) -> list[str]:
    return [f"{line.state}: {line.text}" for line in found.lines if line.part == "Rewards"]


OWN = "method.reward_funcs=['rewards.py:own']"


def test_what_the_datas_answers_and_an_empty_text_earn_is_told(look):
    found = look(SUMS, "", "method.reward_funcs=[number,ends]", "method.reward_weights=[0.8,0.2]")
    first, second, room = lines_of(found)
    assert first.startswith("ok: number, weight 0.8: reference answers earn 1.00 on the mean, an empty text 0.00; ")
    assert second.startswith("ok: ends, weight 0.2: reference answers earn 1.00 on the mean, an empty text 1.00; ")
    assert room.startswith("ok: the longest reference answer has ") and found.problems == []
    told = found.facts["rewards"]["number"]
    assert (told["weight"], told["answer"], told["empty"]) == (0.8, 1.0, 0.0) and told["milliseconds"] < 50


REFUSED = [
    ("def own(completion, row):\n    return None\n", "it gave None, not a number", "line 1"),
    ("def own(completion, row):\n    return 1 / len(completion)\n", "ZeroDivisionError", "line 2), row 1"),
    ("def own(completion, row):\n    return float('inf')\n", "no finite number", "row 1"),
    ("def own(completion, row):\n    return row['gone']\n", "KeyError: 'gone'", "row 1"),
    ("def own(completions, **columns):\n    return [1.0]\n", "it gave 1 numbers for 2 completions", "rewards.py"),
    (
        "import itertools\nn = itertools.count()\ndef own(completion, row):\n    return next(n)\n",
        "a resumed run would",
        "row 1",
    ),
    ("import gone_entirely\ndef own(completion, row):\n    return 1.0\n", "ModuleNotFoundError", "line 1"),
]


@pytest.mark.parametrize(("source", "words", "place"), REFUSED)
def test_a_function_that_gives_no_number_or_another_one_each_time_is_refused_with_its_place(look, source, words, place):
    (problem,) = look(SUMS, source, OWN).problems
    assert problem.what == "method.reward_funcs: rewards.py:own"
    assert words in problem.why and place in problem.why and "rewards.py" in problem.fix


def test_every_reward_is_tried_though_one_is_refused(look):
    source = "def own(completion, row):\n    return None\n\n\ndef other(completion, row):\n    return 'x'\n"
    found = look(SUMS, source, "method.reward_funcs=['rewards.py:own',number,'rewards.py:other']")
    assert [problem.what[-5:] for problem in found.problems] == ["y:own", "other"]
    assert any(line.startswith("ok: number") for line in lines_of(found))


def test_an_answer_that_its_checker_cannot_tell_is_refused_with_its_row_and_value(look):
    rows = [*SUMS[:3], {"instruction": "What is pi?", "answer": "about three"}]
    found = look(rows, "", "method.reward_funcs=[number]")
    (problem,) = found.problems
    assert problem.why.startswith("It gives the reference answer of row 4, 'about three', 0 and not 1")
    assert problem.why.endswith("The answer has no number.")
    type_hints(["method.reward_funcs=[number]"], [problem], lambda command: look(rows, "", *command).problems)


@pytest.mark.parametrize("name", ["number", "exact", "contains"])
def test_a_reward_that_compares_is_refused_where_no_row_has_an_answer(look, name):
    rows = [{"instruction": row["instruction"], "solution": row["answer"]} for row in SUMS]
    argv = [f"method.reward_funcs=[{name},ends]", "method.reward_weights=[1,2]"]
    (problem,) = look(rows, "", *argv).problems
    assert "no row has one" in problem.why and problem.fix.startswith("dataset.columns.answer=<column>")
    type_hints(argv, [problem], lambda command: look(rows, "", *command).problems)
    assert look(rows, "", *argv, "dataset.columns.answer=solution").problems == []


def test_a_text_of_ones_own_needs_no_reference_answer(look):
    rows = [{"instruction": row["instruction"]} for row in SUMS]
    assert look(rows, "", "method.reward_funcs=[contains]", "method.reward_options={contains:{text:so}}").problems == []


def test_rows_without_an_answer_among_others_are_told(look):
    rows = [*SUMS[:3], {"instruction": "What is 9 + 1?", "answer": None}]
    found = look(rows, "", "method.reward_funcs=[number]")
    assert found.problems == []
    assert any(line.startswith("warning: 1 of 4 rows have no reference answer") for line in lines_of(found))


WARNED = [
    ("import time\ndef own(completion, row):\n    time.sleep(0.06)\n    return 1.0\n", "own takes 6"),
    ("def own(completion, row):\n    return 2.0 * len(completion) - 1\n", "own gives -1 to 3"),
    ("def own(completion, row):\n    return 0.5\n", "own gives 3 of 3 reference answers less than 1, that of row 1 0.5"),
]


@pytest.mark.parametrize(("source", "words"), WARNED)
def test_what_works_but_is_seldom_meant_is_told(look, source, words):
    found = look([*SUMS[:2], SUMS[12]], source, OWN)
    assert found.problems == [] and any(words in warning for warning in found.warnings), found.warnings


def test_a_pattern_that_fits_no_answer_is_told(look):
    found = look(SUMS, "", "method.reward_funcs=[regex]", "method.reward_options={regex:{pattern:'^x$'}}")
    assert found.problems == [] and any("none of the first 20 reference answers" in warning for warning in found.warnings)


def test_answers_longer_than_a_completion_are_told_with_what_has_room(look):
    rows = [*SUMS[:3], {"instruction": "Count.", "answer": " ".join(map(str, range(40)))}]
    found = look(rows, "", "method.reward_funcs=[number]", "method.max_completion_length=16")
    (warning,) = [line for line in found.lines if line.part == "Rewards" and line.state == "warning"]
    assert warning.text.startswith("1 of 4 reference answers are longer than method.max_completion_length=16")
    again = look(rows, "", "method.reward_funcs=[number]", warning.fix)
    assert not [line for line in again.lines if line.part == "Rewards" and line.state == "warning"]


def test_the_length_of_a_run_counts_completions(look):
    found = look(
        SUMS, "", "method.reward_funcs=[number]", "preflight.mode=run", "trainer.max_steps=3", "method.num_generations=4"
    )
    (steps, *_) = [line.text for line in found.lines if line.part == "Length"]
    assert steps.startswith("3 steps of 8 prompts x 4 completions: 1.00 epochs, at most ")
