"""A run beside an earlier one: which is better on the rows that both held out."""

import json

import pytest

from sft.report.against import compare_runs
from sft.report.texts import speaker

SAY = speaker("en")
BETTER = [1.5 + 0.01 * i for i in range(20)]


def make(folder, values, name="losses", file="eval_rows.jsonl", held_out="h", **more):
    """A run that has `values` in its held-out rows with the weights it kept, those of step 8 of 10."""
    folder.mkdir()
    lines = [{"step": 8, name: values, **({"targets": [10] * len(values)} if name == "losses" else {})},
             {"step": 10, name: [9.0] * len(values)}]  # fmt: skip
    (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = {"metrics": {"kept_step": 8, "steps": 10, "eval_loss": 1.6}, "data": {"held_out_hash": held_out},
           "settings": {"report": {"against": str(folder.parent / "first")}}, **more}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return run


def compared(tmp_path, theirs, ours, there=(), **more):
    make(tmp_path / "first", theirs, **{**more, **dict(there)})
    return compare_runs(tmp_path / "second", make(tmp_path / "second", ours, **more), SAY)


def test_the_kept_weights_of_both_are_compared_row_by_row(tmp_path):
    found = compared(tmp_path, [x + 0.3 for x in BETTER], BETTER)
    assert (found["tone"], found["headline"]) == ("good", "Better than first, on the rows that both held out")
    assert found["lines"][0] == "Held-out loss: 1.6000 in first, 1.6000 here."
    assert "−0.3000" in found["lines"][1] and found["lines"][2].startswith("Better on 20 of 20")


def test_a_worse_run_and_one_that_may_differ_by_chance_are_told(tmp_path):
    assert compared(tmp_path, BETTER, [x + 0.3 for x in BETTER])["headline"].startswith("Worse than first")
    (tmp_path / "more").mkdir()
    found = compared(tmp_path / "more", BETTER, [x + 0.1 * (-1) ** i for i, x in enumerate(BETTER)])
    assert (found["tone"], found["headline"]) == ("warn", "Not told apart from first: the difference may be chance")


@pytest.mark.parametrize(
    "method, name, file", [("dpo", "margins", "margins.jsonl"), ("grpo", "rewards", "eval_rows.jsonl")]
)  # fmt: skip
def test_of_pairs_margins_are_compared_and_of_rewards_rewards_where_more_is_better(tmp_path, method, name, file):
    settings = {"method": {"name": method}, "report": {"against": str(tmp_path / "first")}}
    more = {"name": name, "file": file, "settings": settings}
    assert compared(tmp_path, BETTER, [x + 0.3 for x in BETTER], **more)["headline"].startswith("Better than first")


@pytest.mark.parametrize(
    "there, line",
    [
        ({"held_out": "another"}, "Other rows were held out there"),
        ({"settings": {"method": {"name": "dpo"}}}, "another method"),
        ({"name": "other"}, "kept no values of single rows"),
    ],
    ids=["rows", "method", "values"],
)
def test_what_cannot_be_compared_says_why(tmp_path, there, line):
    found = compared(tmp_path, BETTER, BETTER, there=there.items())
    assert (found["tone"], found["headline"]) == ("warn", "It cannot be compared with first") and line in found["lines"][0]


def test_a_run_that_is_gone_is_said_and_a_place_is_taken_from_where_the_run_was_started(tmp_path):
    run = make(tmp_path / "second", BETTER)
    assert "no run.json any more" in compare_runs(tmp_path / "second", run, SAY)["lines"][0]
    make(tmp_path / "first", [x + 0.3 for x in BETTER])
    run |= {"settings": {"report": {"against": "first"}}, "working_folder": str(tmp_path)}
    assert compare_runs(tmp_path / "second", run, SAY)["tone"] == "good"
    assert compare_runs(tmp_path / "second", {**run, "settings": {}}, SAY) is None
    run["settings"]["report"]["against"] = "long" * 100
    assert "no run.json any more" in compare_runs(tmp_path / "second", run, SAY)["lines"][0]
