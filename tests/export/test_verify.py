"""Where two completions diverge, and when that is a tie."""

import json
import types

import pytest

from sft.export.measure import EvalResult
from sft.export.proving import _last_samples
from sft.export.verify import compare_completions, find_divergences


def measured(*completions, tops=()):
    return EvalResult(1.0, [], [list(c) for c in completions], [], list(tops))


TOPS = [{5: -0.50, 6: -0.51}, {7: -0.1, 8: -3.0}, {2: -0.2}]


def test_a_parting_says_where_and_how_close_it_was():
    reference = measured([5, 7, 2], [5, 7, 2], [5, 7, 2], [5, 7, 2], [5, 7, 2], tops=[TOPS] * 5)
    found = measured([5, 7, 2], [6, 9], [5, 8, 2], [5, 9, 2], [5, 7])
    assert find_divergences(reference, found) == [
        {"prompt": 1, "token": 0, "gap": 0.01},
        {"prompt": 2, "token": 1, "gap": 2.9},
        {"prompt": 3, "token": 1, "gap": None},  # not among the likeliest
        {"prompt": 4, "token": 2, "gap": None},  # an end mark was lost
    ]


def test_near_ties_are_told_apart_from_other_answers():
    reference = measured([5, 7], [5, 7], [5, 7], tops=[TOPS] * 3)
    check, facts = compare_completions("answers", reference, measured([5, 7], [6, 7], [6, 7]), 0.05)
    assert check.ok and check.found == "1 the same, 2 after a tie (at most 0.0100 nats apart)"
    assert (facts["answers_equal"], facts["near_ties"], facts["widest_tie"]) == (1, 2, 0.01)
    check, facts = compare_completions("answers", reference, measured([5, 7], [5, 8], [5, 7]), 0.05)
    assert not check.ok and check.found == "2 the same, 1 others" and "widest_tie" not in facts


@pytest.mark.parametrize(
    ("run", "steps", "expected"),
    [
        ({"status": "running", "metrics": {"steps": 6, "kept_step": 4}}, [0, 3, 6], [[61], [62]]),
        ({"status": "finished", "metrics": {"steps": 3, "kept_step": 2}}, [0, 3, 3], [[31], [32]]),
        ({"status": "stopped", "metrics": {"steps": 6, "kept_step": 6}}, [0, 3], []),
        ({"status": "stopped", "metrics": {"steps": 3, "kept_step": 2}}, [0, 3], []),
        ({"status": "finished", "metrics": {"steps": 0}}, [], []),
    ],
    ids=["the last of three", "asked twice at one step", "stopped before the last", "of weights that are not kept", "none"],
)
def test_a_saved_adapter_is_held_against_answers_of_the_same_weights(tmp_path, run, steps, expected):
    lines = []
    for place, step in enumerate(steps):
        seen = step in steps[place + 1 :]  # those in between come first
        lines += [{"step": step, "index": i, "source": "held_out", "completion_ids": [-1 if seen else 10 * step + i + 1]}
                  for i in range(2)]  # fmt: skip
        lines.append({"step": step, "index": 2, "source": "config", "completion_ids": [0]})
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert _last_samples(types.SimpleNamespace(folder=tmp_path, record=run)) == expected
