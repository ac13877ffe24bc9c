"""Exports of a run that learnt from rewards: its greedy completions and what they are rewarded with are still the same."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from sft.export import exporter, measure, merge
from sft.export.rewarding import find_rewarding
from sft.export.verify import compare_numbers, compare_rewards, lossless_limits, mean_reward, ties_of
from sft.lifecycle import run
from sft.rewards import load_rewards
from sft.runs.saved import settings_of
from tests.conftest import make_settings

ROWS = [{"instruction": f"Say {n}.", "answer": f"{n}", "level": n % 3} for n in range(24)]

REWARD = '''
def letters(completion, row):
    """Between 0 and 1, and hardly ever the same for two completions."""
    return (sum(map(ord, completion)) + row["level"]) % 17 / 17
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, its reward file beside it; take a copy to change it."""
    place = tmp_path_factory.mktemp("rewarded")
    (place / "rows.json").write_text(json.dumps(ROWS), "utf-8")
    (place / "rewards.py").write_text(REWARD, "utf-8")
    settings = make_settings(
        "method=grpo", "dataset=local", f"dataset.path={place}/rows.json", "dataset.eval_fraction=0.4", "model=tiny_random",
        f"method.reward_funcs=[{place}/rewards.py:letters,length]", "method.reward_weights=[1,0.5]",
        "method.max_completion_length=6", "method.num_generations=4", "tracking=none", "trainer.max_steps=12",
        "trainer.learning_rate=2e-2", "trainer.warmup_steps=0", "lora.lora_alpha=64", "trainer.effective_batch_size=2",
        "trainer.eval_steps=12", "trainer.save_steps=6", "samples.num_held_out=1", "samples.max_new_tokens=4",
        "trainer.load_best_model_at_end=false",
    )  # fmt: skip
    assert run(settings, place / "run").status == "finished"
    return place / "run"


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def export(folder, *formats, weights=None, **options) -> dict:
    settings, _ = settings_of(folder)
    settings.export.formats = list(formats)
    for name, value in options.items():
        setattr(settings.export, name, value)
    return exporter.export_run(folder, settings, weights)


def checks_of(report, name) -> dict[str, bool]:
    return {check["name"]: check["ok"] for check in report["artifacts"][name]["checks"]}


# --------------------------------------------------------------------------------------------------- what is kept


def test_held_out_rows_keep_the_trained_models_completions_and_their_rewards(trained):
    rows, (settings, _) = measure.read_rows(trained), settings_of(trained)
    assert len(rows) >= 8 and all(len(measure.completion_of(row)) <= 6 for row in rows)
    rewards, tokenizer = load_rewards(settings.method), exporter.read_trained(trained, settings, None).tokenizer
    for row in rows:
        raw = ROWS[row.row_number - 1]
        assert json.loads(row.columns) == raw and row.question == raw["instruction"] and row.reference == raw["answer"]
        text = tokenizer.decode(measure.completion_of(row), skip_special_tokens=True)
        assert row.rewards == [rewards[0].function(text, raw), 1.0]
    assert len({tuple(measure.completion_of(row)) for row in rows}) > 1 or len({row.rewards[0] for row in rows}) > 1


# --------------------------------------------------------------------------------------------------- what is proven


def test_exports_have_the_rewards_of_the_trained_model(copied):
    report = export(copied, "adapter", "merged_16bit", "merged_4bit", max_loss_increase=9.0)
    rows, (settings, _) = measure.read_rows(copied), settings_of(copied)
    mean = mean_reward([row.rewards for row in rows[:8]], settings.method.reward_weights)
    assert report["reference"]["reward"] == pytest.approx(mean, abs=1e-6)
    for name in ("adapter", "merged_16bit"):
        facts = report["artifacts"][name]
        assert facts["status"] == "ok" and checks_of(report, name)["rewards"], name
        assert facts["rewards"] == 8 and facts["rewards_equal"] >= 8 - facts["near_ties"]
        assert facts["reward"] == pytest.approx(mean + facts["reward_change"], abs=1e-5)
    assert "rewards" in checks_of(report, "merged_4bit")


def test_a_lost_adapter_turns_the_verdict_red(copied):
    file = copied / "adapter" / "adapter_model.safetensors"
    lost = {name: w * (0.0 if "lora_B" in name else 1.0) for name, w in load_file(file).items()}
    save_file(lost, file, metadata={"format": "pt"})
    report = export(copied, "adapter")
    assert report["artifacts"]["adapter"]["status"] == "failed"
    assert {"loss", "rewards"} <= set(report["artifacts"]["adapter"]["failed"])


def test_merged_weights_without_the_adapter_turn_the_verdict_red(copied, monkeypatch):
    original = merge.merge

    def merge_nothing(model):
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.zero_()
        return original(model)

    monkeypatch.setattr(merge, "merge", merge_nothing)
    report = export(copied, "merged_16bit")
    assert report["artifacts"]["adapter"]["status"] == "ok"
    assert {"loss", "rewards"} <= set(report["artifacts"]["merged_16bit"]["failed"])


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda folder, record: record["reward_files"].clear(), "the file of {name} is another than in the run"),
        (lambda folder, record: record.pop("destinations_mark"), "{name} is code of a run that was not begun by you"),
        (lambda folder, record: record["settings"]["method"]["reward_funcs"].reverse(), "code of a run that was not begun by"),
    ],
    ids=["another file", "from elsewhere", "other rewards than were signed"],
)
def test_rewards_that_are_not_those_of_the_run_are_not_run_and_losses_are_still_compared(copied, caplog, fault, why):
    record = json.loads((copied / "run.json").read_text("utf-8"))
    name = record["settings"]["method"]["reward_funcs"][0]
    fault(copied, record)
    (copied / "run.json").write_text(json.dumps(record), "utf-8")
    report = export(copied, "merged_16bit")
    assert why.format(name=name) in report["reference"]["rewards_not_compared"]
    assert "The rewards of exports are not compared: " in caplog.text
    assert {name: facts["status"] for name, facts in report["artifacts"].items()} == dict.fromkeys(
        ("adapter", "merged_16bit"), "ok")  # fmt: skip
    assert "rewards" not in checks_of(report, "merged_16bit") and checks_of(report, "merged_16bit")["loss"]


def test_a_reward_file_that_is_gone_is_told(copied, trained, tmp_path):
    file = trained.parent / "rewards.py"
    file.rename(tmp_path / "elsewhere.py")
    try:
        report = export(copied, "adapter")
    finally:
        (tmp_path / "elsewhere.py").rename(file)
    assert report["reference"]["rewards_not_compared"] == f"the file of {file}:letters is gone"
    assert report["artifacts"]["adapter"]["status"] == "ok" and "rewards" not in checks_of(report, "adapter")


def test_a_reward_that_raises_at_the_export_is_told_and_fails_nothing(copied, trained, caplog, monkeypatch):
    from sft.export import rewarding

    made = load_rewards(settings_of(copied)[0].method)

    def broken(completion, row):
        raise RuntimeError("no network")

    monkeypatch.setattr(rewarding, "load_rewards", lambda method: [type(made[0])("letters", 1.0, broken), made[1]])
    report = export(copied, "adapter")
    assert "it raised RuntimeError: no network" in caplog.text
    assert report["artifacts"]["adapter"]["status"] == "ok" and "reward" not in report["artifacts"]["adapter"]


def test_a_checkpoint_of_a_run_that_was_killed_is_exported_by_its_own_completions(copied):
    rows = measure.read_rows(copied)
    cut = [measure.replace(row, input_ids=row.input_ids[: row.prompt_length], labels=[], rewards=[]) for row in rows]
    measure._write(copied, cut)
    report = export(copied, "merged_16bit", weights=copied / "checkpoints" / "checkpoint-12")
    facts = report["artifacts"]["merged_16bit"]
    assert facts["status"] == "ok" and facts["rewards"] == 8 and facts["loss"] > 0
    assert report["artifacts"]["adapter"]["note"] == "not measured in training"


def test_prompts_are_kept_with_their_columns_before_a_step_is_made(trained, tmp_path):
    from sft.data.prepare import prepare

    settings, _ = settings_of(trained)
    whole = exporter.read_trained(trained, settings, None)
    measure.write_rows(tmp_path, prepare(settings, whole.tokenizer, whole.stop_ids))
    for row, later in zip(measure.read_rows(tmp_path), measure.read_rows(trained), strict=True):
        assert (row.row_number, row.columns, row.labels, row.rewards) == (later.row_number, later.columns, [], [])
        assert row.input_ids == measure.prompt_of(later) and measure.prompt_of(row) == row.input_ids


def test_runs_of_other_methods_have_no_rewards(tmp_path):
    assert find_rewarding(tmp_path, make_settings(), {}, [], None) == (None, "")


# ------------------------------------------------------------------------------------------------------- the rules


def test_equal_rewards_are_asked_of_a_lossless_format_ties_aside():
    trained = [[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]]
    (check,), facts = compare_rewards(trained, trained, [1.0, 0.5], set(), exact=True)
    assert check.ok and facts == {
        "reward": pytest.approx(2 / 3, abs=1e-6),
        "reward_change": 0.0,
        "rewards": 3,
        "rewards_equal": 3,
    }
    other = [[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]]
    (check,), facts = compare_rewards(trained, other, [1.0, 0.5], set(), exact=True)
    assert not check.ok and check.found == "2 equal, 1 others (mean 0.5000)"
    assert facts["reward_change"] == pytest.approx(-1 / 6, abs=1e-6) and facts["rewards_equal"] == 2
    assert compare_rewards(trained, other, [1.0, 0.5], {1}, exact=True)[0][0].ok
    assert not compare_rewards(trained, other, [1.0, 0.5], {0}, exact=True)[0][0].ok


def test_the_mean_of_a_quantised_format_may_fall_by_a_quarter_of_what_can_be_earned():
    trained = [[1.0]] * 8
    for wrong, ok in ((2, True), (3, False)):
        (check,), facts = compare_rewards(trained, [[0.0]] * wrong + [[1.0]] * (8 - wrong), [1.0], set(), exact=False)
        assert check.ok is ok and check.expected == "a mean of at least 0.7500" and facts["rewards_equal"] == 8 - wrong
    assert compare_rewards([[0.0]], [[1.0]], [1.0], set(), exact=False)[0][0].ok, "a rise is no fault"
    assert compare_rewards([[20.0]], [[16.0]], [1.0], set(), exact=False)[0][0].ok, "of rewards above 1 a quarter of their mean"


def test_rewards_that_are_not_known_are_not_judged():
    assert compare_rewards([], [[1.0]], [1.0], set(), True) == compare_rewards([[1.0]], [], [1.0], set(), True) == ([], {})


def test_only_a_close_divergence_is_a_tie():
    found = [{"prompt": 0, "gap": 0.01}, {"prompt": 1, "gap": 0.2}, {"prompt": 2, "gap": None}]
    assert ties_of(found, 0.05) == {0}


def test_rounding_may_turn_more_of_a_rewarded_runs_few_tokens():
    """The figures of SmolLM2 after 12 steps of sums: rounded to 16 bits, and without its adapter."""
    tops = [[{5: -0.1, 6: -0.389}]]
    reference = measure.EvalResult(0.2737, [], [[5]], [True], tops)
    rounded = measure.EvalResult(0.2776, [], [[6]], [True])
    checks, facts = compare_numbers(reference, rounded, "float32", None, rewarded=True)
    assert [check.ok for check in checks] == [True, True, True] and facts["limit"] == 0.01 and facts["near_ties"] == 1
    assert [check.ok for check in compare_numbers(reference, rounded, "float32", None)[0]] == [False, False, True]
    far = measure.EvalResult(0.4999, [], [[6]], [True])
    reference.tops = [[{5: -0.1, 6: -0.92}]]
    assert [check.ok for check in compare_numbers(reference, far, "float32", None, rewarded=True)[0]] == [False, False, True]
    assert lossless_limits("bfloat16", True) == (0.01, 0.5) and lossless_limits("bfloat16", False) == (0.01, 0.25)
