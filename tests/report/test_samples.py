"""Samples on the page: the largest change first, and what can be seen of a completion without reading it."""

import json

import pytest

from sft.report import page as report_page
from sft.report.samples import judge_samples, marks_of, repeats
from tests.report.test_page import Page, sample, text_of


def test_the_prompt_whose_completion_changed_most_stands_first():
    lines = [sample(0, "one two three", index=0), sample(9, "one two three", index=0),
             sample(0, "one two three", index=1), sample(9, "四五六", index=1),
             sample(0, "one two three", index=2), sample(9, "one two four", index=2)]  # fmt: skip
    assert [prompt["first"]["index"] for prompt in judge_samples(lines)["prompts"]] == [1, 2, 0]


def test_completions_that_ended_are_counted_before_and_after():
    lines = [sample(step, "x", index=at, finish="eos" if at < ended else "length")
             for step, ended in ((0, 1), (5, 2), (9, 4)) for at in range(4)]  # fmt: skip
    assert judge_samples(lines)["ended"] == {0: (1, 4), 9: (4, 4)}
    assert judge_samples([]) == {"prompts": [], "steps": [], "ended": {0: (0, 0)}}


@pytest.mark.parametrize("items, found", [
    ([1, 2, 3] * 4, True), ([7] * 12, True), ([9, 8, *[1, 2, 3, 4, 5] * 3], True), ([1, 2, 3] * 3, False), ([7] * 11, False),
    ([*range(40)], False), ([*[1, 2, 3] * 6, 9, 8, 7], False), ([], False),
])  # fmt: skip
def test_a_piece_that_comes_three_times_at_the_end_is_a_repetition(items, found):
    assert repeats(items) is found


@pytest.mark.parametrize("text, ids, marks", [
    ("", [], (True, False, None)), ("\n\n \n", [5] * 20, (True, False, 20)), ("fine", [1, 2], (False, False, 2)),
    ("no no no no no no ", [], (False, True, None)),
])  # fmt: skip
def test_blank_and_repeated_completions_are_marked(text, ids, marks):
    found = marks_of({"completion": text, "completion_ids": ids})
    assert (found["blank"], found["repeated"], found["tokens"]) == marks


def test_marks_and_buttons_stand_on_the_page_and_half_of_the_counts_are_no_share(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    lines = [
        sample(0, "\n\n", finish="length", completion_ids=[3, 3]),
        sample(9, "la la la la la la la", completion_ids=[4] * 14),
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    html = report_page.write_report(tmp_path).read_text("utf-8")
    text = text_of(html)
    for part in (
        "blank",
        "nothing but white space",
        "repeats itself",
        "cut at the length limit",
        "14 tokens",
        "0 of 1 → 1 of 1",
    ):
        assert part in text, part
    buttons = [
        attributes["data-value"] for tag, attributes in Page(html).tags if tag == "button" and "data-value" in attributes
    ]
    assert buttons == ["better", "same", "worse"] and 'class="card tally"' in html
