"""The curves of a run's page."""

from sft.report.charts import make_charts


def test_curves_can_be_drawn_along_tokens_and_epochs_of_which_the_first_evaluation_has_seen_none():
    rows = [{"step": 0, "epoch": 0.0, "eval_loss": 2.0}, {"step": 1, "epoch": 0.5, "loss": 1.9, "tokens": 70},
            {"step": 2, "epoch": 1.0, "loss": 1.7, "tokens": 150, "eval_loss": 1.8}]  # fmt: skip
    points = make_charts({}, rows)[0]["spec"]["data"]["values"]
    assert [(p["step"], p["tokens"], p["epoch"]) for p in points] == [(0, 0, 0.0), (1, 70, 0.5), (2, 150, 1.0)]
    without = make_charts({}, [{key: value for key, value in row.items() if key != "tokens"} for row in rows])[0]
    assert not any("tokens" in point for point in without["spec"]["data"]["values"])
