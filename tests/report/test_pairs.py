"""What the report shows of the margins of held-out pairs."""

import json

from sft.report import page as report_page
from sft.report.pairs import draw_histogram, summarise_pairs

EVIL = "</script><b>bold</b>"
TEXTS = [{"row": 7 * n, "prompt": f"q{n}", "chosen": f"good{n}", "rejected": EVIL} for n in range(4)]
LINES = [
    {"step": 0, "margins": [0.0] * 4, "log_ratios": [-3.0, 2.0, 1.0, -1.0], "pairs": TEXTS},
    {"step": 5, "margins": [0.1] * 4, "log_ratios": [-9.0, -9.0, -9.0, -9.0]},
    {"step": 9, "margins": [0.5, -0.3, 0.2, 0.0], "log_ratios": [2.0, -1.0, 3.0, -1.0]},
]


def test_flipped_pairs_are_those_whose_likelier_side_changed_from_the_first_evaluation_to_the_last():
    found = summarise_pairs(LINES)
    assert [(one["prompt"], one["first"], one["last"], one["margin"]) for one in found["flipped"]] == [
        ("q1", 2.0, -1.0, -0.3),
        ("q0", -3.0, 2.0, 0.5),
    ]
    assert {name: found[name] for name in ("count", "above", "first_step", "step", "lost", "gained")} == {
        "count": 4, "above": 2, "first_step": 0, "step": 9, "lost": 1, "gained": 1,
    }  # fmt: skip


def test_bars_count_every_margin_and_one_begins_at_0():
    margins = [-0.31, -0.02, 0.0, 0.01, 0.9, 1.7]
    bars = draw_histogram(margins)["data"]["values"]
    assert sum(bar["pairs"] for bar in bars) == 6 and all((bar["from"] < 0) == (bar["to"] <= 0) for bar in bars)
    for bar in bars:
        assert bar["pairs"] == sum(bar["from"] <= margin < bar["to"] for margin in margins)
    assert draw_histogram([0.0, 0.0])["data"]["values"] == [{"from": 0.0, "to": 1.0, "pairs": 2}]


def test_a_run_without_pairs_and_one_with_odd_lines_have_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    assert 'id="pairs"' not in report_page.write_report(tmp_path).read_text()
    odd = [{"margins": [None, 0.5]}, {"step": 1, "margins": [None], "log_ratios": [None, "x"]}]
    (tmp_path / "margins.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd) + "{torn")
    assert 'id="pairs"' in report_page.write_report(tmp_path).read_text()
    (tmp_path / "margins.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    html = report_page.write_report(tmp_path).read_text()
    assert "above 0 in 2 of 4 pairs" in html and "&lt;b&gt;bold" in html and EVIL not in html
