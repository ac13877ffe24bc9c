"""Where two completions diverge, and when that is a tie; the margins of pairs and their signs."""

import json
import types

import pytest
from datasets import Dataset

from sft.data.token_cache import Prepared
from sft.export import measure
from sft.export.measure import EvalResult, HeldOutRow
from sft.export.proving import _last_samples
from sft.export.verify import compare_completions, compare_margins, find_divergences


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


LABELS = [-100, 5, 6]


def pair(*reference):
    return HeldOutRow("held_out", [1, 5, 6], LABELS, 1, "?", "", [1, 5, 6], LABELS, list(reference))


@pytest.mark.parametrize(
    ("chosen", "rejected", "failed"),
    [
        ([-3.0, -3.0, -3.0], [-4.0, -4.0, -4.0], 0),  # each margin is 1 nat more than 0
        ([-3.0, -3.0, -3.0], [-4.0, -2.0, -4.0], 1),
        ([-3.0, -3.0, -3.0], [-3.0, -3.0, -2.0], 2),  # 0 is no sign; the last pair is noise
    ],
)
def test_margins_of_pairs_keep_their_signs_but_for_noise(chosen, rejected, failed):
    rows = [pair(-10.0, -10.0), pair(-20.0, -20.0), pair(-30.0, -30.0)]
    trained = [[-3.0, -4.0], [-3.0, -4.0], [-3.0, -3.003]]  # of four target tokens, in float32: 0.004 nats are noise
    losses = [[-one / 2 for one in both] for both in (chosen, rejected)]
    found = EvalResult(0.0, losses[0], [], [], [], losses[1])
    (check,), facts = compare_margins(rows, trained, found, "float32", judged=True)
    assert (check.name, check.ok) == ("margins", not failed)
    assert facts == {"margins": 2, "margins_kept": 2 - failed, "margins_in_noise": 1}
    assert compare_margins(rows, trained, found, "float32", judged=False) == ([], facts)


def test_a_margin_is_what_was_gained_since_the_run_began():
    rows = [pair(-2.0, -10.0)]  # the chosen answer was likelier from the start, and lost
    found = EvalResult(0.0, [1.5], [], [], [], [5.0])
    (check,), _ = compare_margins(rows, [[-3.0, -12.0]], found, "float32", judged=True)
    assert not check.ok and measure.margins(rows, [[-3.0, -12.0]]) == [1.0] and measure.margins(rows, [[-3.0, -10.0]]) == [-1.0]


def test_rows_without_a_reference_have_no_margins():
    row = HeldOutRow("held_out", [1, 5, 6], LABELS, 1, "?", "")
    assert compare_margins([row], [[]], EvalResult(0.0, [1.0], [], []), "float32", judged=True) == ([], {})
    assert compare_margins([pair()], [[-3.0, -4.0]], EvalResult(0.0, [1.0], [], [], [], [1.0]), "float32", True) == ([], {})


def test_held_out_rows_that_are_no_pairs_are_kept_as_ever(tmp_path):
    row = {"input_ids": [1, 5], "labels": [-100, 5], "prompt_length": 1, "question": "", "reference": "", "row": 3}
    measure.write_rows(tmp_path, Prepared(None, Dataset.from_list([row, row]), {}))
    line = (
        '{"source": "held_out", "input_ids": [1, 5], "labels": [-100, 5], "prompt_length": 1, "question": "", "reference": ""}'
    )
    assert (tmp_path / "held_out.jsonl").read_text(encoding="utf-8") == f"{line}\n{line}\n"
