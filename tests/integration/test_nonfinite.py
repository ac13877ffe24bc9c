"""Losses and gradients that are no numbers, planted, and time limits."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import transformers

from sft.lifecycle import run
from sft.model import builtin
from tests.conftest import make_settings
from tests.faults.fault_campaign import BASE, compare, write_rows

JOB = (*BASE, "dataset=local", "trainer.max_steps=5", "trainer.eval_steps=3", "trainer.save_steps=3", "samples.num_held_out=0",
       "lora.lora_dropout=0")  # fmt: skip


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def quick_report(monkeypatch):
    """Reports without their chart library, which takes longer than such a run."""
    monkeypatch.setattr("sft.report.page.bundled_charts", lambda: "")


@pytest.fixture
def short(tmp_path):
    """Composed settings of a run over rows of a few tokens."""
    return lambda *overrides: make_settings(*JOB, write_rows(tmp_path), *overrides)


@pytest.fixture
def plant(monkeypatch):
    """`plant(3, 4)`: the loss of the third and fourth forward pass in training is not a number."""
    original = transformers.Trainer.compute_loss  # under TRL's, and by itself for rows end to end

    def plant(*passes: int) -> None:
        numbers = itertools.count(1)

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            found = original(self, model, inputs, return_outputs, **kwargs)
            if not model.training or next(numbers) not in passes:
                return found
            return (found[0] * math.nan, found[1]) if return_outputs else found * math.nan

        monkeypatch.setattr(transformers.Trainer, "compute_loss", compute_loss)

    return plant


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_bad_step_changes_no_weight_and_is_counted(plant, short, tmp_path, optim):
    plant(3, 4, 8)  # steps 2 and 4
    run(short(f"trainer.optim={optim}"), tmp_path / "run")
    record = record_of(tmp_path / "run")
    assert record["status"] == "finished" and record["metrics"]["bad_steps"] == 2
    steps = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert [line["loss"] is None for line in steps] == [False, True, False, True, False]
    assert [line.get("bad_steps") for line in steps] == [None, 1, 1, 2, 2]
    assert all(math.isfinite(line["eval_loss"]) for line in lines_of(tmp_path / "run") if "eval_loss" in line)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_weights_after_a_bad_step_are_those_before_it(plant, short, tmp_path, optim):
    """Evaluated after every step: the loss after the bad one is the loss before it, to the last bit."""
    plant(5)
    every = ("trainer.eval_steps=1", "trainer.save_steps=1", "trainer.learning_rate=1e-2", f"trainer.optim={optim}")
    run(short(*every), tmp_path / "run")
    losses = {line["step"]: line["eval_loss"] for line in lines_of(tmp_path / "run") if "eval_loss" in line}
    assert losses[3] == losses[2] and losses[2] != losses[1] and losses[4] != losses[3]


def test_too_many_bad_steps_end_the_run_at_the_last_good_state_and_name_the_rows(plant, short, tmp_path, capfd):
    plant(*range(3, 99))
    result = run(short("trainer.max_bad_steps=1", "dataset.shuffle=false"), tmp_path / "run")
    record = record_of(tmp_path / "run")
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "2 steps had a loss or gradient that is not a finite number" in record["reason"]
    assert "The last was step 3, with row " in record["reason"] and "error" not in record
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir() and (tmp_path / "run" / "adapter").is_dir()


def test_a_time_limit_stops_in_time_and_the_run_goes_on_to_the_same_end(short, tmp_path):
    job = (
        "trainer.max_steps=3",
        "trainer.eval_steps=2",
        "trainer.save_steps=2",
        "samples.num_held_out=1",
        "samples.every_steps=2",
        "trainer.learning_rate=1e-2",
    )
    run(short(*job), tmp_path / "whole")
    for _ in range(8):
        result = run(short(*job, "trainer.max_hours=1e-9"), tmp_path / "cut")
        assert result.exit_code == 0
        record = record_of(tmp_path / "cut")
        if record["status"] == "finished":
            break
        assert record["status"] == "stopped" and record["reason"].startswith("time limit at step")
        last = [line for line in lines_of(tmp_path / "cut") if "eval_loss" in line][-1]
        assert last["step"] == record["metrics"]["steps"], "evaluated before it stopped"
    assert len(record["sessions"]) == 3
    assert compare(tmp_path / "whole", tmp_path / "cut") == []


def test_a_model_whose_weights_are_no_numbers_fails_with_that_sentence(short, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(builtin.local_model(builtin.TINY_RANDOM), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], math.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = run(short(f"model.name={folder}"), tmp_path / "run")
    assert (result.status, result.exit_code) == ("failed", 1)
    reason = record_of(tmp_path / "run")["reason"]
    assert reason.startswith("The model's held-out loss before the first step is not a finite number.") and "row" not in reason
    result = run(short(f"model.name={folder}", "dataset.eval_fraction=0"), tmp_path / "none_held_out")
    assert (result.status, result.exit_code) == ("failed", 1)
    assert record_of(tmp_path / "none_held_out")["reason"].startswith("all 5 steps had a loss or gradient")


def test_a_run_all_of_whose_steps_were_skipped_has_failed(plant, short, tmp_path):
    plant(*range(1, 50))
    result = run(short(), tmp_path / "run")
    assert (result.status, result.exit_code) == ("failed", 1)
    assert record_of(tmp_path / "run")["reason"] == "all 5 steps had a loss or gradient that is not a finite number"
