"""Whole runs on a tiny model: what they leave behind, and that equal runs are equal."""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sft.lifecycle import run
from sft.runs.record import Context
from sft.signals import StopRequest
from sft.tracking.names import name_metric
from sft.training import checkpoint as training_checkpoint

QUICK = ("trainer.max_steps=4", "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2",
         "trainer.eval_steps=2", "trainer.save_steps=2", "samples.every_steps=2")  # fmt: skip


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def learning(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the memory say."""
    unstable = ("tokens_per_second", "memory_gib", "eos_share")
    lines = [{k: v for k, v in line.items() if k not in unstable} for line in read_lines(folder / "metrics.jsonl")]
    return [line for line in lines if "loss" in line or "eval_loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, shared by the tests that only look at it."""
    from tests.conftest import SMALL, make_settings

    folder = tmp_path_factory.mktemp("finished")
    result = run(make_settings(*SMALL, *QUICK), folder, Context("name", "python train.py", ("a=b",), ("tag",)))
    return folder, result


def test_run_folder_keeps_the_contract(finished):
    folder, result = finished
    assert (result.status, result.exit_code) == ("finished", 0)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished" and record["reason"] is None and record["ended_at"] >= record["started_at"]
    for key in (
        "config_hash",
        "seed",
        "git_commit",
        "versions",
        "hardware",
        "settings",
        "data",
        "model",
        "metrics",
        "artifacts",
    ):
        assert key in record
    assert {"import", "data", "load", "prepare", "train", "total"} <= record["seconds"].keys() and record["seconds"]["data"] > 0
    assert record["data"]["train_rows"] == 22 and record["data"]["eval_rows"] == 2 and record["data"]["hash"]
    assert record["model"]["trainable_parameters"] < record["model"]["parameters"]
    for name in ("metrics.jsonl", "samples.jsonl", "preflight.json", "report.html", "adapter/adapter_model.safetensors"):
        assert (folder / name).is_file(), name
    assert (folder / "adapter" / "tokenizer.json").is_file()
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".hydra"]


def test_metrics_have_every_step_and_the_agreed_keys(finished):
    lines = read_lines(finished[0] / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gib"}
    assert all(set(line) == keys for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]


def test_tokens_only_grow(finished):
    lines = [line for line in read_lines(finished[0] / "metrics.jsonl") if "loss" in line]
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(lines))


def test_one_epoch_counts_all_tokens(small, tmp_path):
    settings = small("trainer.num_train_epochs=1", "trainer.per_device_train_batch_size=4", "samples.num_held_out=0")
    run(settings, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["tokens"] == record["data"]["train_tokens"]


def test_samples_before_during_and_after(finished):
    lines = read_lines(finished[0] / "samples.jsonl")
    assert [(line["step"], line["index"]) for line in lines] == [(s, i) for s in (0, 2, 4) for i in (0, 1)]
    for line in lines:
        assert line["finish"] in ("eos", "length") and line["source"] == "held_out" and line["reference"]
        assert line["prompt"].endswith("<|im_start|>assistant\n") and line["question"] in line["prompt"]
    assert all(line["prompt"] == lines[line["index"]]["prompt"] for line in lines)


def test_best_weights_are_kept_and_are_those_on_disk(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, result = finished
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    losses = {line["step"]: line["eval_loss"] for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line}
    later = {step: loss for step, loss in losses.items() if step}
    assert record["metrics"]["best_eval_loss"] == min(later.values()) == result.metric
    assert record["metrics"]["kept_step"] == min(later, key=later.get)
    checkpoint = folder / "checkpoints" / f"checkpoint-{record['metrics']['kept_step']}"
    from safetensors.torch import load_file

    kept, best = load_file(folder / "adapter/adapter_model.safetensors"), load_file(checkpoint / "adapter_model.safetensors")
    assert kept.keys() == best.keys() and all(torch.equal(kept[k], best[k]) for k in kept)
    base = json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")


def test_the_same_run_twice_gives_the_same_numbers(finished, small, tmp_path):
    run(small(*QUICK), tmp_path)
    assert learning(tmp_path) == learning(finished[0])
    assert read_lines(tmp_path / "samples.jsonl") == read_lines(finished[0] / "samples.jsonl")


def test_another_seed_gives_other_numbers(finished, small, tmp_path):
    run(small(*QUICK, "seed=1"), tmp_path)
    assert learning(tmp_path) != learning(finished[0])


def test_samples_do_not_change_the_training(small, tmp_path):
    """With dropout, so that a random number drawn by sampling would show."""
    dropout = (*QUICK, "lora.lora_dropout=0.3")
    run(small(*dropout), tmp_path / "with")
    run(small(*dropout, "samples.num_held_out=0"), tmp_path / "without")
    assert learning(tmp_path / "with") == learning(tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_training_lowers_the_loss(small, tmp_path):
    run(small("lora=none", "trainer.max_steps=30", "trainer.learning_rate=1e-2", "trainer.eval_steps=30",
              "trainer.save_steps=30"), tmp_path)  # fmt: skip
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["eval_loss"] < record["metrics"]["eval_loss_start"] - 0.3


def test_prompts_of_ones_own_go_through_the_template(small, tmp_path):
    run(small("trainer=debug", "samples.num_held_out=0", "samples.prompts=['Why is the sky blue?', '你好吗']"), tmp_path)
    lines = read_lines(tmp_path / "samples.jsonl")
    assert {line["question"] for line in lines} == {"Why is the sky blue?", "你好吗"} and lines[0]["source"] == "config"
    assert lines[0]["prompt"].endswith("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n")


def test_the_evaluation_loss_does_not_depend_on_the_batch(small, tmp_path):
    """Rows of unlike lengths: a mean over batches would differ in the second digit."""
    losses = []
    for rows in (1, 3, 8):
        evaluation = ("dataset.eval_fraction=0.4", f"trainer.per_device_eval_batch_size={rows}", "trainer=debug")
        run(small(*evaluation), tmp_path / str(rows))
        losses.append([line["eval_loss"] for line in read_lines(tmp_path / str(rows) / "metrics.jsonl") if "eval_loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] == pytest.approx(losses[2], abs=1e-5)


def test_the_loss_of_each_held_out_row_is_kept_at_every_evaluation(small, tmp_path):
    job = ("dataset.eval_fraction=0.4", *QUICK)
    run(small(*job), tmp_path / "whole")
    run(small(*job, "trainer.padding_free=false"), tmp_path / "padded")
    for name, steps in (("whole", [0, 2, 4]), ("padded", [0, "kept"])):
        folder = tmp_path / name
        metrics = json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]
        kept, rows = read_lines(folder / "eval_rows.jsonl"), read_lines(folder / "held_out.jsonl")
        assert [line["step"] for line in kept] == [metrics["kept_step"] if step == "kept" else step for step in steps]
        means = {line["step"]: line["eval_loss"] for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line}
        for line in kept:
            assert line["targets"] == [sum(label != -100 for label in row["labels"][1:]) for row in rows]
            total = sum(loss * count for loss, count in zip(line["losses"], line["targets"], strict=True))
            assert total / sum(line["targets"]) == pytest.approx(means[line["step"]], abs=2e-5)
    one, other = (read_lines(tmp_path / name / "eval_rows.jsonl")[0]["losses"] for name in ("whole", "padded"))
    assert len(set(one)) > 2 and one == pytest.approx(other, abs=2e-5)


def test_early_stopping_ends_the_run_and_says_so(small, tmp_path):
    """A learning rate of nearly nothing cannot lower the loss by the threshold."""
    settings = small("trainer.max_steps=20", "trainer.learning_rate=1e-9", "trainer.eval_steps=2", "trainer.save_steps=2",
                     "trainer.early_stopping_patience=2", "trainer.early_stopping_threshold=0.01")  # fmt: skip
    result = run(settings, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert result.exit_code == 0 and record["status"] == "finished" and "stopped early" in record["reason"]
    assert record["metrics"]["steps"] < 20


def test_the_best_weights_are_kept_where_checkpoints_fall_between_evaluations(small, tmp_path):
    """A learning rate after whose first steps nothing gets better."""
    run(small("trainer.max_steps=8", "trainer.eval_steps=2", "trainer.save_steps=3", "trainer.learning_rate=300",
              "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0"), tmp_path)  # fmt: skip
    losses = {line["step"]: line["eval_loss"] for line in read_lines(tmp_path / "metrics.jsonl") if "eval_loss" in line}
    kept = min((2, 4, 6, 8), key=losses.get)
    assert kept % 3 and json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["metrics"]["kept_step"] == kept
    weights = (tmp_path / "checkpoints" / f"checkpoint-{kept}" / "adapter_model.safetensors").read_bytes()
    last = (tmp_path / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == weights != last


def test_a_short_run_measures_its_loss_before_and_after(small, tmp_path):
    run(small("dataset.max_rows=40", "samples.max_new_tokens=4"), tmp_path)
    lines = read_lines(tmp_path / "metrics.jsonl")
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    steps = record["metrics"]["steps"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, steps] and record["metrics"]["kept_step"] == steps
    assert {line["step"] for line in read_lines(tmp_path / "samples.jsonl")} == {0, steps}
    plan = json.loads((tmp_path / "preflight.json").read_text(encoding="utf-8"))["plan"]
    assert plan["evaluated_every"] == plan["answers_every"] == steps == 5


def test_checkpoints_stay_within_the_limit(small, tmp_path):
    run(small("trainer.max_steps=6", "trainer.eval_steps=1", "trainer.save_steps=1", "trainer.save_total_limit=2"), tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) <= 2


def test_a_failure_is_recorded_with_its_reason(small, tmp_path, monkeypatch):

    def break_down(*args, **kwargs):
        raise RuntimeError("out of luck") from KeyError("the cause")

    monkeypatch.setattr("sft.methods.sft.build_trainer", break_down)
    result = run(small(*QUICK), tmp_path)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (result.status, result.exit_code) == ("failed", 1)
    assert record["status"] == "failed" and record["reason"] == "RuntimeError: out of luck (because of KeyError: 'the cause')"
    assert "break_down" in record["error"]["traceback"] and (tmp_path / "report.html").is_file()


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(2)`: a Ctrl-C while step 2 runs."""
    seen = []
    original = StopRequest.listening

    def listening(self):
        seen.append(self)
        return original(self)

    monkeypatch.setattr(StopRequest, "listening", listening)
    from sft.training import metrics as training_metrics

    add = training_metrics.Recorder.add

    def stop(step):
        def add_and_stop(self, metrics):
            add(self, metrics)
            if metrics["step"] == step and "loss" in metrics:
                seen[0].signal = "SIGINT"

        monkeypatch.setattr(training_metrics.Recorder, "add", add_and_stop)

    return stop


def test_a_stop_request_saves_the_adapter(small, tmp_path, stop_at):
    stop_at(2)
    result = run(small(*QUICK, "trainer.max_steps=50", "trainer.eval_steps=50", "trainer.save_steps=50"), tmp_path)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (result.status, result.exit_code) == ("stopped", 130)
    assert record["reason"] == "SIGINT at step 2" and record["metrics"]["kept_step"] == 2
    assert "eval_loss" not in record["metrics"]  # measured at step 0 only, of other weights
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoints" / "checkpoint-2").is_dir()


def test_the_time_of_the_last_evaluation_is_known_before_the_first_step_is_over(small, tmp_path, stop_at, monkeypatch):
    from sft.training.time_budget import TimeBudget

    looks, used_up = [], TimeBudget.used_up
    monkeypatch.setattr(TimeBudget, "used_up", lambda self: looks.append(self.earlier | self.needs) or used_up(self))
    stop_at(2)
    settings = small("trainer.max_steps=4", "trainer.eval_steps=4", "trainer.save_steps=4", "trainer.max_hours=1")
    assert run(settings, tmp_path).status == "stopped"
    assert {"load", "evaluate", "samples", "step"} <= looks[0].keys() and looks[0]["evaluate"] > 0
    before = looks[-1]["evaluate"]
    looks.clear()
    stop_at(-1)
    assert run(settings, tmp_path).status == "finished"
    assert looks[0]["evaluate"] == before, "a run that goes on measures none before its last step"


def test_a_run_that_was_stopped_after_its_best_step_goes_on_from_its_last(small, tmp_path, stop_at):
    stop_at(5)
    settings = small("trainer.max_steps=8", "trainer.eval_steps=2", "trainer.save_steps=8", "trainer.learning_rate=300",
                     "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.save_total_limit=1")  # fmt: skip
    assert run(settings, tmp_path).status == "stopped"
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["kept_step"] < 5
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()


def test_a_cut_run_that_goes_on_loses_no_line_and_no_answer_in_wandb(small, tmp_path, monkeypatch):
    from sft.training.metrics import Recorder

    def add_and_fail(self, metrics, add=Recorder.add):
        add(self, metrics)
        if metrics["step"] == 3:
            raise RuntimeError("cut")

    settings = small(*QUICK, "tracking=wandb", "tracking.mode=offline")
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add", add_and_fail)
        assert run(settings, tmp_path).status == "failed"
    kept = training_checkpoint.read_state(tmp_path / "checkpoints/checkpoint-2")["bytes"]["metrics.jsonl"]
    assert kept < (tmp_path / "metrics.jsonl").stat().st_size, "lines came after the checkpoint"
    time.sleep(1.1)  # W&B names a folder by the second
    assert run(settings, tmp_path).status == "finished"
    given = []
    for binary in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", binary]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        records = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
        given.append([record["history"]["item"] for record in records if record["type"] == "history"])
    assert len(given) == 2
    first, second = ([line["_step"] for line in lines] for lines in given)
    assert max(first) < min(second) and second == sorted(set(second))
    for key in ("loss", "eval_loss", "eos_share"):
        wanted = {(line["step"], line[key]) for line in read_lines(tmp_path / "metrics.jsonl") if key in line}
        named = name_metric(key)
        assert wanted <= {(line["train/global_step"], line[named]) for lines in given for line in lines if named in line}
    asked = [(line["step"], line["completion"]) for line in read_lines(tmp_path / "samples.jsonl")]
    last = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["tracking"]["id"]
    tables = sorted(tmp_path.glob(f"wandb/offline-run-*-{last}/files/media/table/*.json"), key=lambda p: p.stat().st_mtime)
    tables = [table for table in tables if table.parents[3] == max(tmp_path.glob("wandb/offline-run-*"))]
    rows = [row for table in tables for row in json.loads(table.read_text(encoding="utf-8"))["data"]]
    assert sorted((row[0], row[3]) for row in rows) == sorted(asked)


def test_full_fine_tuning_saves_a_whole_model(small, tmp_path):
    run(small("lora=none", "trainer=debug"), tmp_path)
    assert (tmp_path / "model" / "model.safetensors").is_file() and not (tmp_path / "adapter").exists()


def test_extra_reaches_the_trainer(small, tmp_path, monkeypatch):
    from sft.config.batching import batch_plan_of, with_batch_plan
    from sft.methods.arguments import training_arguments
    from sft.plan.plan import Plan

    settings = small("trainer.extra.adam_beta2=0.95")
    arguments = training_arguments(with_batch_plan(settings, batch_plan_of(settings.trainer, 2)), tmp_path, True, Plan())
    assert arguments.adam_beta2 == 0.95


def test_after_ten_steps_the_run_says_how_long_the_others_take(small, tmp_path, caplog):
    caplog.set_level("INFO")
    short = ("trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1", "trainer.max_steps=13")
    assert run(small(*short, "trainer.logging_steps=5", "samples.num_held_out=0"), tmp_path / "run").status == "finished"
    told = [record.getMessage() for record in caplog.records if "of training left" in record.getMessage()]
    assert len(told) == 1 and re.fullmatch(r"step   10   about \d+ s of training left", told[0])
