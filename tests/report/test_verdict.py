"""The verdict on a run: what the held-out rows say, and how sure that is."""

import json
import math
import random
import statistics

import pytest

from sft.report import page as report_page
from sft.report.texts import speaker
from sft.report.verdict import judge, paired_interval, student, wilson_interval
from tests.report.test_page import text_of

SAY = speaker("en")
METRICS = {"eval_loss_start": 2.0, "eval_loss": 1.5, "steps": 20, "kept_step": 20}


def lines(before: list[float], after: list[float], step: int = 20, **more) -> list[dict]:
    return [{"step": 0, "losses": before, "targets": [10] * len(before), **more}, {"step": step, "losses": after, **more}]


def curve(**values: float) -> list[dict]:
    return [{"step": int(step[1:]), "eval_loss": value} for step, value in values.items()]


def verdict(rows: list[dict], kept: list[dict], metrics: dict = METRICS, **other) -> dict:
    return judge({"metrics": metrics, **other}, rows, kept, [], SAY)


def test_with_equal_weights_the_interval_is_the_paired_t_interval():
    changes = [-0.5, -0.1, 0.2, -0.4, -0.3, 0.1, -0.2, -0.6, -0.1, 0.0]
    mean, low, high = paired_interval(changes, [7.0] * 10)
    half = 2.2622 * statistics.stdev(changes) / math.sqrt(10)  # 97.5 % point of t with 9 degrees of freedom
    assert (mean, low, high) == pytest.approx((statistics.mean(changes), mean - half, mean + half), abs=1e-4)


@pytest.mark.parametrize("freedom, point", [(7, 2.3646), (9, 2.2622), (25, 2.0595), (100, 1.9840)])
def test_points_of_t_are_those_of_the_tables(freedom, point):
    assert student(freedom) == pytest.approx(point, abs=1e-3)


def test_an_interval_of_weighted_rows_holds_the_true_change_in_about_95_of_100_draws():
    drawn, inside = random.Random(1), 0
    for _ in range(400):
        weights = [drawn.choice((5, 20, 60)) for _ in range(30)]
        changes = [drawn.gauss(-0.3, 0.5) for _ in weights]
        _, low, high = paired_interval(changes, weights)
        inside += low <= -0.3 <= high
    assert 0.90 <= inside / 400 <= 0.98


def test_the_interval_of_a_share_is_wilsons():
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_a_run_that_lowers_the_loss_of_nearly_all_rows_is_better():
    after = [1.9 - 0.02 * i for i in range(24)] + [2.1, 2.2]
    found = verdict(curve(s0=2.0, s10=1.7, s20=1.5), lines([2.0] * 26, after))
    assert found["tone"] == "good" and found["headline"].startswith("Better than before training")
    text = " ".join(found["lines"])
    assert "Held-out loss: 2.0000 before training, 1.5000 after; perplexity 7.39, then 4.48." in text
    assert "Better on 24 of 26 held-out rows, worse on 2." in text
    mean, low, high = paired_interval([b - 2.0 for b in after], [10] * 26)
    assert f"{mean:+.4f}".replace("-", "−") in text and f"{high:+.4f}".replace("-", "−") in text and low < high < 0
    assert "the last step is the best one" in text


def test_a_change_that_may_be_chance_and_too_few_rows_are_no_verdict():
    even = verdict(curve(s0=2.0, s10=2.0, s20=2.0), lines([2.0] * 10, [2.1, 1.9] * 5))
    assert even["tone"] == "warn" and "may be chance" in even["headline"]
    few = verdict(curve(s0=2.0, s20=1.0), lines([2.0] * 7, [1.0] * 7))
    assert few["tone"] == "warn" and few["headline"] == "Too few rows to tell: 7 held out, 8 are needed"
    assert "Better on 7 of 7" in " ".join(few["lines"]) and "confidence" not in " ".join(few["lines"])


def test_a_run_that_raises_the_loss_is_worse():
    found = verdict(curve(s0=1.0, s10=1.2, s20=1.5), lines([1.0] * 9, [1.5 + i / 100 for i in range(9)]))
    assert found["tone"] == "bad" and found["headline"].startswith("Worse")


def test_overfitting_is_told_by_the_kept_step_against_the_last():
    metrics = {**METRICS, "kept_step": 10}
    kept = lines([2.0] * 9, [1.4] * 9, step=10)
    text = " ".join(verdict(curve(s0=2.0, s10=1.4, s20=1.6), kept, metrics)["lines"])
    assert "Overfitting: the weights of step 10 are kept (1.4000); at the last step, 20, it was 1.6000." in text
    text = " ".join(verdict(curve(s0=2.0, s20=1.5), lines([2.0] * 9, [1.5] * 9))["lines"])
    assert "evaluated once after training began" in text


@pytest.mark.parametrize("kept", [[], lines([2.0] * 9, [1.0] * 8), lines([None] * 9, [1.0] * 9), lines([2.0] * 9, [1.0] * 9, 7),
                                  lines([2.0] * 9, [1.0] * 9, targets=[0] * 9)])  # fmt: skip
def test_without_values_of_rows_it_is_said_that_there_is_no_interval(kept):
    found = verdict(curve(s0=2.0, s20=1.0), kept)
    assert found["headline"] == "The change has no interval" and found["tone"] == "warn"


@pytest.mark.parametrize("metrics", [{}, {"eval_loss_start": 1.0}, {"eval_loss": 1.0}])
def test_without_a_value_before_and_after_there_is_no_verdict(metrics):
    assert verdict(curve(s0=2.0, s20=1.0), [], metrics) is None


def test_a_run_that_ended_before_its_second_evaluation_has_no_verdict():
    assert verdict(curve(s0=2.0), lines([2.0] * 9, [2.0] * 9), {"eval_loss_start": 2.0, "eval_loss": 2.0, "steps": 3}) is None


def test_lines_that_a_resumed_run_wrote_anew_replace_the_earlier_ones():
    again = [*lines([2.0] * 9, [9.0] * 9), {"step": 20, "losses": [1.0] * 9}]
    assert verdict(curve(s0=2.0, s20=1.0), again)["tone"] == "good"


def test_of_pairs_the_accuracy_has_an_interval():
    run = {"metrics": METRICS, "settings": {"method": {"name": "dpo"}}}

    def of(*margins: float) -> dict:
        return judge(run, curve(s0=0.7, s10=0.6, s20=0.5), [], [{"step": 20, "margins": [*margins]}], SAY)

    good = of(*[1.0] * 18, -1.0, 0.0)
    assert good["tone"] == "good" and "18.5 of 20 held-out pairs: accuracy 92%" in good["lines"][1]
    assert "perplexity" not in good["lines"][0]
    assert of(*[1.0] * 11, *[-1.0] * 9)["tone"] == "warn" and of(*[-1.0] * 20)["tone"] == "bad" and of(1.0)["tone"] == "warn"


def test_of_rewards_each_prompt_is_compared_and_more_is_better():
    run = {"metrics": {"eval_reward_start": 0.2, "eval_reward": 0.9, "steps": 20, "kept_step": 20},
           "settings": {"method": {"name": "grpo"}}}  # fmt: skip
    rows = [{"step": step, "eval_reward": value} for step, value in ((0, 0.2), (10, 0.5), (20, 0.9))]
    kept = [{"step": 0, "rewards": [0.0] * 8 + [1.0] * 2}, {"step": 20, "rewards": [1.0] * 9 + [0.0]}]
    found = judge(run, rows, kept, [], SAY)
    assert found["tone"] == "good" and "Better on 8 of 10 held-out rows, worse on 1." in found["lines"]
    assert found["lines"][0] == "Held-out reward: 0.2000 before training, 0.9000 after."


def test_the_verdict_stands_on_top_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "metrics": METRICS}), "utf-8")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, curve(s0=2.0, s20=1.5))), "utf-8")
    (tmp_path / "eval_rows.jsonl").write_text("\n".join(map(json.dumps, lines([2.0] * 9, [1.5] * 9))) + "\n{torn", "utf-8")
    html = report_page.write_report(tmp_path).read_text("utf-8")
    assert '<section class="verdict good">' in html and html.index("verdict good") < html.index('class="stats"')
    assert "Better on 9 of 9 held-out rows" in text_of(html)
