"""What a reader sees of method=grpo: its numbers in run.json, the log, trackers, sweeps and the report."""

import csv
import json
import logging
import math
import sys
import tracemalloc
import types

import huggingface_hub
import pytest

import sft.lifecycle as sft_run
from sft.config.method import DPO, GRPO, SFT
from sft.report import page as report_page
from sft.report.rollouts import reward_charts, summarise_rollouts
from sft.report.texts import speaker
from sft.runs.record import log_ending
from sft.storage import jsonio
from sft.sweep import leaderboard, publish, runner
from sft.sweep.charts import draw_curves, draw_effect, draw_parallel
from sft.sweep.index import SweepIndex, judge
from sft.sweep.report import write_sweep_report
from sft.sweep.search import make_search
from sft.tracking.base import Trackers, make_trackers
from sft.tracking.names import MAX_TEXT, RolloutTable, name_metric, name_metrics
from sft.tracking.wandb import WandbTracker, _lines_in
from tests.conftest import make_settings
from tests.export import test_card
from tests.report.test_page import charts_of, text_of

SAY = speaker("en")
SETTINGS = {"method": {"name": "grpo"}, "trainer": {"max_bad_steps": 10}}
METRICS = [
    {"step": 0, "eval_reward": 0.25, "eval_ended": 0.5, "eval_length": 9.0, "eval_reward/number": 0.2, "eval_reward/ends": 0.5},
    {"step": 1, "loss": 0.0, "reward": 0.1, "ended": 0.75, "length": 8.0, "reward_std": 0.2, "zero_groups": 0.5, "entropy": 2.0,
     "reward/number": 0.0, "reward/ends": 0.75, "tokens": 90},
    {"step": 2, "loss": 0.0, "reward": 0.9, "ended": 1.0, "length": 6.0, "reward_std": 0.1, "zero_groups": 0.0, "entropy": 1.0,
     "reward/number": 1.0, "reward/ends": 1.0, "tokens": 180},
    {"step": 2, "eval_reward": 0.75, "eval_ended": 1.0, "eval_length": 6.0, "eval_reward/number": 0.7, "eval_reward/ends": 1.0},
]  # fmt: skip
RUN = {
    "status": "finished", "name": "sums", "settings": SETTINGS, "data": {"source": "sums", "eval_rows": 4},
    "metrics": {"eval_reward_start": 0.25, "eval_reward": 0.75, "best_eval_reward": 0.75, "best_step": 2, "reward": 0.9,
                "loss": 0.0},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder of a finished run."""
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    (tmp_path / "run.json").write_text(json.dumps(RUN), "utf-8")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS), "utf-8")
    return tmp_path


# ------------------------------------------------------------------------------------------------------ one run


def test_the_last_line_of_a_run_says_the_reward_before_and_after(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    facts = {"status": "finished", "reason": None, "metrics": RUN["metrics"], "artifacts": {}}
    log_ending(make_settings("method=grpo"), tmp_path, facts)
    assert "Done   finished: held-out reward 0.2500 -> 0.7500" in caplog.text
    log_ending(make_settings(), tmp_path, {**facts, "metrics": {"eval_loss": 1.0, "eval_loss_start": 2.0}})
    assert "Done   finished: held-out loss 2.0000 -> 1.0000" in caplog.text and "chat.py" not in caplog.text


def test_a_run_that_ends_says_how_to_talk_to_it_and_one_that_was_stopped_how_it_goes_on(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    facts = {"status": "finished", "reason": None, "metrics": {}, "artifacts": {"adapter": "adapter"}}
    log_ending(make_settings(), tmp_path / "a run", facts)
    log_ending(make_settings("model.trust_remote_code=true"), tmp_path / "b", facts)
    talk = [record.getMessage().split() for record in caplog.records if record.getMessage().split()[0] == "talk"]
    assert talk == [["talk", "python", "scripts/chat.py", "run='a", "run'"],
                    ["talk", "python", "scripts/chat.py", "run=b", "model.trust_remote_code=true"]]  # fmt: skip
    caplog.clear()
    log_ending(make_settings(), tmp_path / "b", {**facts, "status": "stopped"})
    assert "train.py resume=b" in caplog.text and "chat.py" not in caplog.text


def test_the_report_has_the_reward_before_and_after_and_its_curves(folder):
    html = report_page.write_report(folder).read_text("utf-8")
    text = text_of(html)
    assert "Held-out reward 0.2500 → 0.7500 +0.5000 best 0.7500 at step 2 · training reward 0.9000" in text
    assert 'class="mark good">+0.5000' in html and "Held-out loss" not in text
    charts = charts_of(html)
    drawn = [name for name, spec in charts.items() if spec]
    assert drawn == ["reward", "reward_0", "reward_1", "length", "ended"], "others have two points"
    points = charts["reward"]["data"]["values"]
    assert points[0] == {"step": 0, "tokens": 0, "eval_reward": 0.25} and points[2] == {
        "step": 2, "tokens": 180, "reward": 0.9, "smooth": 0.5444444, "eval_reward": 0.75}  # fmt: skip
    assert [(p["reward_1"], p["eval_reward_1"]) for p in charts["reward_1"]["data"]["values"] if p["step"] == 2] == [(1.0, 1.0)]
    assert "Reward: number" in text and "Reward: ends" in text and "KL" not in text, "there is none"


def test_a_reward_that_fell_is_marked_as_bad(folder):
    worse = {**RUN, "metrics": {**RUN["metrics"], "eval_reward_start": 0.0, "eval_reward": -0.5}}
    (folder / "run.json").write_text(json.dumps(worse), "utf-8")
    assert 'class="mark bad">−0.5000' in report_page.write_report(folder).read_text("utf-8")


def test_a_run_that_died_early_has_its_rewards_from_its_curves(folder):
    (folder / "run.json").write_text(json.dumps({**RUN, "status": "running", "metrics": {}}), "utf-8")
    assert "Held-out reward 0.2500 → 0.7500" in text_of(report_page.write_report(folder).read_text("utf-8"))


def test_charts_of_rewards_take_any_name_and_show_a_kl_that_there_is():
    rows, charts = reward_charts([{"step": 1, "reward/a['x']": 1.0, "reward/b.c": 2.0, "kl": 0.1}])
    assert rows == [{"step": 1, "reward_0": 1.0, "reward_1": 2.0, "kl": 0.1}]
    assert [chart[0] for chart in charts][:3] == ["reward", "reward_0", "reward_1"] and charts[-1][0] == "kl"
    rows, charts = reward_charts([{"step": 1, "reward/only": 1.0}])
    assert [chart[0] for chart in charts] == ["reward", "entropy", "length", "ended", "zero_groups"]


def test_the_report_shows_the_best_and_the_worst_prompt_of_five_steps(folder):
    lines = []
    for step in range(1, 10):
        good = rollout(step, 1.0, 0.5, row=2, text=f"<b>good {step}</b>")
        lines += [rollout(step, 0.5, 0.25, row=1), good, rollout(step, 0.0, 0.0, row=3)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    shown = summarise_rollouts(folder / "rollouts.jsonl")
    assert [step["step"] for step in shown] == [1, 3, 5, 7, 9] and {step["count"] for step in shown} == {3}
    assert [[(group["row"], group["mean"], group["equal"]) for group in step["groups"]] for step in shown] == [
        [(2, 0.75, False), (3, 0.0, True)]] * 5  # fmt: skip
    best = shown[0]["groups"][0]
    assert [(one["reward"], one["advantage"]) for one in best["completions"]] == [(1.0, 0.0), (0.5, -0.5)]
    assert best["names"] == ["number", "ends"] and best["prompt"] == "2 + 2?"
    html = report_page.write_report(folder).read_text("utf-8")
    assert "Best: mean reward 0.750" in html and "Worst: mean reward 0.000, all equal: nothing to learn from" in html
    assert "&lt;b&gt;good 9&lt;/b&gt;" in html and "good 2" not in html


def test_a_step_of_one_prompt_has_one_and_many_completions_are_its_best_and_worst(folder):
    (folder / "rollouts.jsonl").write_text(json.dumps(rollout(1, *(i / 100 for i in range(40)))), "utf-8")
    ((group,),) = [step["groups"] for step in summarise_rollouts(folder / "rollouts.jsonl")]
    rewards = [one["reward"] for one in group["completions"]]
    assert rewards == [*(i / 100 for i in range(39, 31, -1)), *(i / 100 for i in range(7, -1, -1))]
    assert group["left_out"] == 24 and group["mean"] == pytest.approx(0.195)
    assert "24 completions between are not shown." in report_page.write_report(folder).read_text("utf-8")


def test_rollouts_larger_than_the_memory_are_shown(folder):
    path, text = folder / "rollouts.jsonl", "x" * 10_000
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, 1001):
            file.write(json.dumps(rollout(step, 0.0, 1.0, text=text)) + "\n")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    shown = summarise_rollouts(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [step["step"] for step in shown] == [1, 251, 501, 750, 1000] and peak < 2e6


def test_damaged_rollouts_are_left_out_by_name(folder, caplog):
    odd = {**rollout(2, 0.5), "completions": [{"text": 7, "reward": 1.0, "rewards": {"number": "x"}}, {"reward": None}, 3]}
    lines = [json.dumps(rollout(1, 0.5)), json.dumps(odd), '{"step": 3, "completions": [', '{"step": 4}', "\udcff"]
    (folder / "rollouts.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    shown = summarise_rollouts(folder / "rollouts.jsonl")
    assert [(step["step"], len(step["groups"][0]["completions"])) for step in shown] == [(1, 1), (2, 1)]
    assert "rollouts.jsonl: ignored, because of an odd form" in caplog.text and "completions[0].text" in caplog.text
    assert "Step 2" in text_of(report_page.write_report(folder).read_text("utf-8"))
    assert summarise_rollouts(folder / "nothing.jsonl") == []


def test_the_card_says_what_was_rewarded_and_what_it_earned_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    names = ["number", "/home/me/secret-project/rewards.py:polite"]
    method = {"name": "grpo", "reward_funcs": names, "reward_weights": [0.8, 0.2]}
    run = test_card.make_run(
        settings={**test_card.make_run()["settings"], "method": method}, metrics=RUN["metrics"],
        differs_from_defaults={"method.reward_funcs": {"default": [], "value": names}},
        command=f"python train.py 'method.reward_funcs=[{','.join(names)}]'",
    )  # fmt: skip
    artifact = {**test_card.ROW, "reward": 0.7, "reward_change": -0.05, "rewards": 8, "rewards_equal": 7}
    verify = {"reference": {"loss": 0.1, "rows": 8, "reward": 0.75}, "artifacts": {"adapter": artifact}}
    card = test_card.write(tmp_path, run=run, metrics=METRICS, verify=verify)
    assert test_card.metadata(card)["tags"] == ["grpo", "lora"]
    assert "| trained by | GRPO, on the rewards `number` (weight 0.8), `polite` (weight 0.2) |" in card
    assert "| held-out reward | 0.2500 before, 0.7500 after |" in card and "held-out loss" not in card
    assert "### Reward\n\n| step | training reward | held-out reward |" in card
    assert "| 2 | 0.9000 | 0.7500 |" in card and "| 1 | 0.1000 | – |" in card
    assert "the mean reward of its greedy completions 0.7500." in card and "; reward 0.7000 (-0.0500) |" in card
    assert "Because." in card and "So that." in card, "samples of before and after"
    assert "/home" not in card and "rewards.py:polite" in card
    verify["reference"] = {"rewards_not_compared": "the file of /home/me/secret-project/rewards.py:polite is gone"}
    card = test_card.write(tmp_path, run=run, metrics=METRICS, verify=verify)
    assert "Rewards were not compared: `the file of rewards.py:polite is gone`." in card


@pytest.mark.parametrize("odd", [None, "number", {"a": 1}, [None, 3]])
def test_a_card_of_odd_rewards_is_written(tmp_path, monkeypatch, odd):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    method = {"name": "grpo", "reward_funcs": odd, "reward_weights": odd}
    card = test_card.write(tmp_path, run=test_card.make_run(settings={"method": method}), metrics=METRICS)
    assert "| held-out reward | 0.2500 before, 0.7500 after |" in card


def test_the_report_shows_rewards_of_exports_and_why_there_are_none(folder):
    facts = {"status": "ok", "loss": 0.1, "answers": 8, "answers_equal": 8, "reward": 0.7, "reward_change": -0.05, "rewards": 8,
             "rewards_equal": 7}  # fmt: skip
    (folder / "export").mkdir()
    reference = {"loss": 0.1, "rows": 8, "prompts": 8, "source": "held_out", "reward": 0.75}
    verify = {"reference": reference, "artifacts": {"merged_16bit": facts}}
    (folder / "export" / "verify.json").write_text(json.dumps(verify), "utf-8")
    text = text_of(report_page.write_report(folder).read_text("utf-8"))
    assert "Mean reward of its greedy completions of these prompts: 0.7500." in text
    assert "0.7000 (−0.0500)" in text and "Same completionsRewardEnded by EOS" in text
    verify["reference"] = {"rewards_not_compared": "the file of r.py:f is gone"}
    (folder / "export" / "verify.json").write_text(json.dumps(verify), "utf-8")
    text = text_of(report_page.write_report(folder).read_text("utf-8"))
    assert "Rewards were not compared: the file of r.py:f is gone." in text
    del facts["rewards"]
    (folder / "export" / "verify.json").write_text(json.dumps(verify), "utf-8")
    text = text_of(report_page.write_report(folder).read_text("utf-8"))
    assert "Same completionsEnded by EOS" in text, "as in a run of another method"


# ------------------------------------------------------------------------------------------------------ trackers


def test_curves_have_the_names_of_trls_grpo_trainer():
    line = {"step": 2, "reward": 0.9, "reward_std": 0.1, "zero_groups": 0.0, "entropy": 1.0, "kl": 0.2, "length": 6.0,
            "ended": 0.75, "reward/number": 1.0, "clipped": 0.1, "sampler_gap": 0.0}  # fmt: skip
    assert name_metrics(line, 7) == {
        "train/global_step": 2, "train/num_tokens": 7, "train/reward": 0.9, "train/reward_std": 0.1,
        "train/frac_reward_zero_std": 0.0, "train/entropy": 1.0, "train/kl": 0.2, "train/completions/mean_length": 6.0,
        "train/completions/clipped_ratio": 0.25, "train/rewards/number/mean": 1.0, "train/clip_ratio/region_mean": 0.1,
        "train/sampling/sampling_logp_difference/mean": 0.0,
    }  # fmt: skip
    assert name_metrics({"step": 0, "eval_reward": 0.5, "eval_ended": 1.0, "eval_reward/number": 0.5}, 0) == {
        "train/global_step": 0, "train/num_tokens": 0, "eval/reward": 0.5, "eval/completions/clipped_ratio": 0.0,
        "eval/rewards/number/mean": 0.5,
    }  # fmt: skip
    assert name_metric("reward_chosen") == "train/reward_chosen" and name_metric("eval_loss") == "eval/loss"


def test_trl_logs_these_names():
    import inspect

    from trl import GRPOTrainer

    source = inspect.getsource(sys.modules[GRPOTrainer.__module__])
    named = ["reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length",
             "completions/clipped_ratio", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean"]  # fmt: skip
    assert [name for name in named if f'["{name}"].append' not in source] == []
    assert '[f"rewards/{reward_func_name}/mean"]' in source


def test_an_alert_says_the_reward():
    tracker = WandbTracker()
    tracker._settings = make_settings("method=grpo")
    assert tracker._shown(RUN["metrics"]) == "held-out reward 0.2500 -> 0.7500"
    assert tracker._shown({}) == "no held-out reward"
    tracker._settings = make_settings()
    assert tracker._shown({"eval_loss_start": 2.0, "eval_loss": 1.0}) == "held-out loss 2.0000 -> 1.0000"


def rollout(step: int, *rewards: float, row: int = 1, text: str = "") -> dict:
    """A line of rollouts.jsonl with a completion for each reward, and the reward as its text."""
    completions = [{"text": text or str(reward), "finish": "ended", "tokens": 2, "rewards": {"number": reward, "ends": 1.0},
                    "reward": reward, "advantage": reward - 1} for reward in rewards]  # fmt: skip
    return {"step": step, "row": row, "prompt": "2 + 2?", "completions": completions}


def test_the_table_of_rollouts_has_the_best_the_worst_and_two_more_of_the_prompt_whose_rewards_differ_most():
    table = RolloutTable()
    table.keep([rollout(1, 0.5, 0.5), rollout(1, 0.3, 0.1, 0.9, 0.4, 0.2, 0.6, 0.7, row=2), rollout(1, 0.2, 0.4, row=3)])
    rows = table.take(1)
    assert table.columns == [
        "step",
        "row",
        "prompt",
        "completion",
        "finish",
        "reward",
        "reward/number",
        "reward/ends",
        "advantage",
    ]
    assert [row[5] for row in rows] == [0.9, 0.6, 0.3, 0.1]
    assert rows[0] == [1, 2, "2 + 2?", "0.9", "ended", 0.9, 0.9, 1.0, pytest.approx(-0.1)]
    assert table.take(2) == [], "it has no rollout of its own"
    table.keep([rollout(3, 1.0, text="x" * 5000)])
    assert [len(row[3]) for row in table.take(3)] == [MAX_TEXT + 2]


def test_a_long_run_has_a_table_of_few_rollouts():
    table = RolloutTable()
    for step in range(1, 10_001):
        table.keep([rollout(step, 0.0, 1.0)])
        table.take(step)
    steps = sorted({row[0] for row in table.rows})
    assert steps[:100] == [*range(1, 101)] and steps[100] == 102 and 400 < len(steps) < 450


class Tables:
    """A tracker that keeps what is logged."""

    name = "tables"

    def __init__(self) -> None:
        self.given: list[tuple] = []

    def __getattr__(self, verb):
        return lambda *given: {} if verb == "state" else self.given.append((verb, *given))

    @property
    def rollouts(self) -> list[tuple]:
        return [given[1:] for given in self.given if given[0] == "log_rollouts"]


def test_rollouts_go_with_the_next_log_line_and_a_resumed_run_has_those_of_before(folder):
    """With `logging_steps` 2 and two updates a rollout; it is cut after step 4."""
    steps, metrics = (1, 3, 5), folder / "metrics.jsonl"
    metrics.write_text("", "utf-8")

    def go(trackers, first, last):
        for step in range(first, last + 1):
            if step in steps:
                jsonio.append_jsonl(folder / "rollouts.jsonl", rollout(step, 0.1, 0.1 * step))
                trackers.log_rollouts([rollout(step, 0.1, 0.1 * step)])
            if step % 2 == 0:
                line = {"step": step, "reward": 0.5}
                jsonio.append_jsonl(metrics, line)
                trackers.log(line)

    whole = Tables()
    go(Trackers([whole]), 1, 6)
    assert [(step, [row[0] for row in rows], len(earlier)) for step, _, rows, earlier in whole.rollouts] == [
        (2, [1, 1], 0), (4, [3, 3], 2), (6, [5, 5], 4)]  # fmt: skip
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (folder / name).unlink()
    go(Trackers([Tables()]), 1, 4)
    resumed = Tables()
    trackers = Trackers([resumed])
    trackers.start(make_settings(), folder, "n", [], {"mode": "offline", "tracker": "tables"})
    go(trackers, 5, 6)
    assert resumed.rollouts == whole.rollouts[2:]


def test_what_is_odd_in_the_files_of_before_leaves_rows_out_and_raises_nothing(folder):
    good = json.dumps(rollout(1, 0.1, 0.9))
    odd = ['{"step": "x", "completions": [1]}', '{"step": 1}', "not json", '{"completions": [{"reward": "a"}], "step": 1}']
    (folder / "rollouts.jsonl").write_text("\n".join([good, *odd]), "utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 1}\n{"step": null, "reward": 1}\n{"reward": 2}\n', "utf-8")
    table = RolloutTable()
    table.replay(folder, 5)
    assert [row[5] for row in table.rows] == [0.9, 0.1]


def test_a_run_passes_rollouts_of_each_logged_step_to_its_trackers(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def sevenths(completion, row):\n    return len(completion) % 7 / 7\n", "utf-8")
    tables = Tables()
    monkeypatch.setattr(sft_run, "make_trackers", lambda settings: Trackers([tables]))
    settings = make_settings(
        "method=grpo", "model=tiny_random", "dataset.max_rows=24", "samples.num_held_out=0", "trainer.max_steps=4",
        f"method.reward_funcs=[{tmp_path}/rewards.py:sevenths]", "method.reward_weights=[1]", "method.num_generations=5",
        "trainer.logging_steps=2", "tracking=none",
    )  # fmt: skip
    assert sft_run.run(settings, tmp_path / "run").status == "finished"
    lines = jsonio.read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert [step for step, *_ in tables.rollouts] == [2, 4] and len(lines) == 8
    for step, columns, rows, _ in tables.rollouts:
        table = RolloutTable()
        table.keep([line for line in lines if line["step"] == step])
        assert (table.take(step), table.columns) == (rows, columns) and len(rows) == 4


def test_wandb_has_a_table_of_rollouts_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = make_trackers(make_settings("method=grpo", "tracking=wandb"))
    trackers.start(make_settings("method=grpo", "tracking=wandb"), tmp_path, "n", [])
    for step in (1, 2):
        trackers.log_rollouts([rollout(step, 0.0, 1.0)])
        trackers.log({"step": step, "reward": 0.5, "loss": 0.0})
    trackers.finish("finished", {})
    assert trackers._failed == set()
    tables = [json.loads(path.read_text("utf-8")) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    rows = sorted(row for table in tables for row in table["data"])
    assert [(row[0], row[3], row[5]) for row in rows] == [(1, "0.0", 0.0), (1, "1.0", 1.0), (2, "0.0", 0.0), (2, "1.0", 1.0)]
    assert tables[0]["columns"][-3:] == ["reward/number", "reward/ends", "advantage"]


def test_wandb_counts_the_rollouts_that_a_cut_run_may_have_logged(folder):
    (folder / "rollouts.jsonl").write_text("{}\n{}\n", "utf-8")
    assert _lines_in(folder) == len(METRICS) + 2


# -------------------------------------------------------------------------------------------------------- sweeps


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep over `method.temperature` with rewards 0.2, 0.8 and 0.5; they began at 0.3."""
    monkeypatch.setattr(report_page, "bundled_charts", lambda: "/* charts */")
    monkeypatch.chdir(tmp_path)
    index = SweepIndex(tmp_path, "id", "python train.py -m ...", jsonio.now())
    for value, reward in ((0.6, 0.2), (0.8, 0.8), (1.0, 0.5)):
        words = [f"method.temperature={value}"]
        job = index.add(make_settings("method=grpo", *words), dict(word.split("=") for word in words), ["method.temperature"])
        job.status = "finished"
        metrics = {"eval_reward": reward, "eval_reward_start": 0.3, "reward": 0.9, "loss": 0.0}
        run = {**RUN, "config_hash": job.config_hash, "metrics": metrics, "data": {"eval_rows": 4, "held_out_hash": "h"}}
        (tmp_path / job.folder).mkdir()
        (tmp_path / job.folder / "run.json").write_text(json.dumps(run), "utf-8")
        lines = [{"step": 0, "eval_reward": 0.3}, {"step": 1, "reward": 0.4, "loss": 0.0}, {"step": 2, "eval_reward": reward}]
        (tmp_path / job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    index.save()
    return tmp_path


def test_a_sweep_ranks_rewards_upwards(sweep, capsys):
    board = leaderboard.read_leaderboard(sweep)
    assert [(row.metric, row.start, row.note) for row in board.rows] == [
        (0.8, 0.3, ""), (0.5, 0.3, ""), (0.2, 0.3, "worse than before training")]  # fmt: skip
    rows = list(csv.DictReader(leaderboard.write_csv(board).read_text("utf-8").splitlines()))
    assert [(row["eval_reward"], row["eval_reward_start"]) for row in rows] == [("0.8", "0.3"), ("0.5", "0.3"), ("0.2", "0.3")]
    assert "eval_loss" not in rows[0] and "eval_reward" in publish.make_table(board)[0]
    leaderboard.show(sweep)
    shown = capsys.readouterr().err
    assert "held-out reward" in shown and "0.8000" in shown and "loss" not in shown
    assert leaderboard.best_run(sweep).name == board.best.job.folder


def test_what_is_rounded_in_the_curves_is_not_worse_than_before():
    assert not GRPO.is_worse(2 / 3, 0.666667) and GRPO.is_worse(0.66, 0.666667) and not GRPO.is_worse(0.7, 0.666667)
    assert not SFT.is_worse(1.0, 1.0) and SFT.is_worse(1.1, 1.0) and not SFT.is_worse(0.9, 1.0)


def test_a_sweeps_page_speaks_of_rewards(sweep):
    board = leaderboard.read_leaderboard(sweep)
    text = text_of(write_sweep_report(board).read_text("utf-8"))
    assert "Best held-out reward0.8000" in text and "Ranked by the held-out reward; higher is better." in text
    assert "loss" not in text
    curves, effect, parallel = draw_curves(board, SAY), draw_effect(board, SAY), draw_parallel(board, SAY)
    assert curves["title"] == "Held-out reward" and effect["title"] == "temperature against held-out reward"
    assert [p["reward"] for p in effect["spec"]["data"]["values"]] == [0.8, 0.5, 0.2]
    heights = {p["reward"]: p["place"] for p in parallel["spec"]["data"]["values"] if p["axis"] == "held-out reward"}
    assert heights == pytest.approx({0.2: 0.0, 0.5: 0.5, 0.8: 1.0}), "up is better"


def test_without_held_out_rows_the_curves_are_of_the_training_reward(sweep):
    for path in sweep.glob("*/metrics.jsonl"):
        path.write_text("".join(f'{{"step": {step}, "reward": 0.{step}, "loss": 0.0}}\n' for step in (1, 2)), "utf-8")
    curves = draw_curves(leaderboard.read_leaderboard(sweep), SAY)
    assert curves["title"] == "Training reward" and curves["spec"]["data"]["values"][0]["reward"] == 0.1


def test_a_job_of_another_method_is_not_ranked_among_rewards(sweep):
    place = next(sweep.glob("2_*")) / "run.json"
    run = json.loads(place.read_text("utf-8"))
    run |= {"settings": {"method": {"name": "dpo"}}, "metrics": {"eval_loss": 0.1, "eval_loss_start": 0.7}}
    place.write_text(json.dumps(run), "utf-8")
    rows = leaderboard.read_leaderboard(sweep).rows
    assert [(row.rank, row.metric) for row in rows] == [(1, 0.8), (2, 0.2), (None, None)]
    assert rows[-1].note == "not ranked: dpo is measured by eval_loss"


def test_the_summary_of_a_sweep_in_wandb_has_the_best_reward(sweep, monkeypatch):
    summary = {}
    made = types.SimpleNamespace(log=lambda line: None, summary=summary, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **_: made, Table=lambda **_: None, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(publish, "wandb_settings", lambda: types.SimpleNamespace(run_group=None))
    monkeypatch.setattr(publish, "place", lambda tracking: (None, "sft"))
    publish._write_summary(sweep, make_settings("method=grpo"), "offline")
    assert summary["best_eval_reward"] == 0.8 and "best_eval_loss" not in summary


def test_a_search_maximises_rewards_and_minimises_losses(monkeypatch, sweep):
    given = []
    plugin = types.SimpleNamespace(OptunaSweeper=lambda **options: given.append(options["direction"]))
    verbosity = types.SimpleNamespace(set_verbosity=lambda level: None, WARNING=0)
    monkeypatch.setitem(sys.modules, "optuna", types.SimpleNamespace(logging=verbosity))
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_optuna_sweeper", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper", plugin)
    for method in (SFT, DPO, GRPO):
        make_search(None, 3, 1, None, method)
    assert given == ["minimize", "minimize", "maximize"]
    jobs = leaderboard.read_leaderboard(sweep).index.jobs
    jobs[2].status = "diverged"
    assert [runner._result(job, sweep).return_value for job in jobs] == [0.2, 0.8, -math.inf]


def test_a_run_without_a_number_as_reward_diverged():
    assert judge({**RUN, "metrics": {"loss": 0.0, "eval_reward": 0.5}}) == ("finished", None)
    lost = judge({**RUN, "metrics": {"loss": 0.0, "eval_reward": None, "eval_loss": 1.0}})
    assert lost == ("diverged", "diverged: the held-out reward is not a number")
