"""Rewards of one's own: how they are called, and what is said of one that raises or gives no number, with row and line."""

import pytest

from sft.config.schema import MethodName, MethodSettings
from sft.errors import Refusal
from sft.rewards import RewardFault, load_rewards, reward_row

ENTRY = {"columns": '{"level": 3, "prompt": "raw"}', "question": "What is 7 + 15?", "reference": "22", "row": 5}


def load(tmp_path, source: str, *names: str):
    file = tmp_path / "rewards.py"
    file.write_text(source, encoding="utf-8")
    return load_rewards(MethodSettings(MethodName.grpo, reward_funcs=[f"{file}:{name}" for name in names or ["own"]]))


def problem_of(tmp_path, source: str):
    with pytest.raises(Refusal) as caught:
        load(tmp_path, source)
    (problem,) = caught.value.problems
    return problem


def rows(count: int = 1, finish: str = "ended") -> list[dict]:
    return [reward_row(ENTRY, finish, 4) for _ in range(count)]


def test_a_row_has_the_datas_columns_and_what_is_known_of_the_completion():
    row = reward_row(ENTRY, "length", 12)
    assert row == {"level": 3, "prompt": "What is 7 + 15?", "answer": "22", "finish": "length", "tokens": 12}
    assert row.number == 5


def test_a_function_is_called_with_one_completion_and_its_row(tmp_path):
    (reward,) = load(tmp_path, "def own(completion, row):\n    return len(completion) + row['level'] + row['tokens']\n")
    assert (reward.name, reward.weight, reward.takes_lists) == ("own", 1, False)
    assert reward.score(["", "abc"], rows(2)) == [7.0, 10.0]


def test_a_function_of_trls_form_is_called_with_lists(tmp_path):
    source = "def own(prompts, completions, level, **kwargs):\n"
    source += "    return [len(p) + len(c) + n + len(kwargs['answer']) for p, c, n in zip(prompts, completions, level)]\n"
    (reward,) = load(tmp_path, source)
    assert reward.takes_lists and reward.score(["", "abc"], rows(2)) == [20.0, 23.0]


def test_lists_without_further_keywords_are_those_that_are_asked_for(tmp_path):
    (reward,) = load(
        tmp_path,
        "def own(completions, answer, trainer_state=None):\n    return [c == a for c, a in zip(completions, answer)]\n",
    )
    assert reward.score(["22", "23"], rows(2)) == [1.0, 0.0]


def test_truth_and_numbers_of_numpy_are_numbers(tmp_path):
    source = "import numpy as np\ndef own(completion, row):\n    return np.float32(0.5) if completion else True\n"
    (reward,) = load(tmp_path, source)
    assert reward.score(["", "a"], rows(2)) == [1.0, 0.5]


def test_several_functions_of_a_file_are_of_one_module_and_its_text_of_now(tmp_path):
    source = "calls = []\ndef first(completion, row):\n    calls.append(1)\n    return {}\n"
    source += "def second(completion, row):\n    return len(calls)\n"
    first, second = load(tmp_path, source.format(1.0), "first", "second")
    assert first.score(["a"], rows()) + second.score(["a"], rows()) == [1.0, 1.0]
    (again,) = load(tmp_path, source.format(2.0), "first")
    assert again.score(["a"], rows()) == [2.0]


def test_a_file_can_import_one_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("VALUE = 0.25\n")
    (reward,) = load(tmp_path, "from beside_it import VALUE\ndef own(completion, row):\n    return VALUE\n")
    assert reward.score(["a"], rows()) == [0.25]


def test_a_function_that_changes_its_row_changes_no_others(tmp_path):
    (reward,) = load(tmp_path, "def own(completion, row):\n    return float(row.pop('answer') == '22')\n")
    both = rows() * 2
    assert reward.score(["a", "a"], both) == [1.0, 1.0] and both[0]["answer"] == "22"


def test_weights_follow_the_order_of_the_rewards():
    method = MethodSettings(MethodName.grpo, reward_funcs=["number", "ends"], reward_weights=[0.8, 0.2])
    assert [(reward.name, reward.weight) for reward in load_rewards(method)] == [("number", 0.8), ("ends", 0.2)]


FAULTS = [
    ("    return None", "line 2), row 5: it gave None, not a number"),
    ("    return 'high'", "it gave 'high' of type str, not a number"),
    ("    return float('nan')", "which is no finite number"),
    ("    return 10 ** 400", "which is no finite number"),
    ("    return [1.0]", "it gave [1.0] of type list, not a number"),
    ("    return row['gone']", "line 3), row 5: it raised KeyError: 'gone'"),
    ("    return helper(completion)", "line 7), row 5: it raised ZeroDivisionError"),
]


@pytest.mark.parametrize(("body", "words"), FAULTS)
def test_a_reward_that_gives_no_number_is_named_with_its_line_and_row(tmp_path, body, words):
    source = f"\ndef own(completion, row):\n{body}\n\n\ndef helper(text):\n    return 1 / 0\n"
    (reward,) = load(tmp_path, source)
    with pytest.raises(RewardFault) as caught:
        reward.score(["a"], rows())
    text = str(caught.value)
    assert text.startswith(f"the reward own ({tmp_path / 'rewards.py'}, line ") and words in text


LISTS = [
    ("completions", "    return [1.0]", "it gave 1 numbers for 2 completions"),
    ("completions", "    return 1.0", "it gave 1.0 of type float, not a list"),
    ("completions", "    return None", "it gave None, not a list"),
    ("completions", "    return [1.0, None]", "row 5: it gave None, not a number"),
    ("completions, gone", "    return [1.0, 1.0]", "it asks for gone; the data has answer,"),
    ("completions", "    raise ValueError('no')", "line 2), row 5: it raised ValueError: no"),
]


@pytest.mark.parametrize(("parameters", "body", "words"), LISTS)
def test_a_reward_of_lists_that_gives_another_is_named(tmp_path, parameters, body, words):
    (reward,) = load(tmp_path, f"def own({parameters}):\n{body}\n")
    with pytest.raises(RewardFault) as caught:
        reward.score(["a", "b"], rows(2))
    assert words in str(caught.value)


REFUSED = [
    ("import gone_entirely\ndef own(completion, row):\n    return 1.0\n", "ModuleNotFoundError"),
    ("raise SystemExit(3)\ndef own(completion, row):\n    return 1.0\n", "SystemExit"),
    ("own = 3\n", "own is no function"),
    ("async def own(completion, row):\n    return 1.0\n", "async"),
    ("def own(completion):\n    return 1.0\n", "It takes (completion)"),
    ("def own(completion, row, extra):\n    return 1.0\n", "It takes (completion, row, extra)"),
    ("def own(completions, completion_ids):\n    return [1.0]\n", "asks for completion_ids"),
]


@pytest.mark.parametrize(("source", "words"), REFUSED)
def test_a_file_or_function_that_cannot_be_called_is_refused_before_the_start(tmp_path, source, words):
    problem = problem_of(tmp_path, source)
    assert words in problem.why and problem.fix


def test_the_line_that_a_file_raises_at_is_named(tmp_path):
    assert problem_of(tmp_path, "def own(completion, row):\n    return 1.0\n\n1 / 0\n").fix.endswith("rewards.py, line 4")
