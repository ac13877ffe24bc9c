"""However the rows of a step are split into passes, and whatever runs out of memory on the way, the losses are the same."""

import itertools

import pytest
import torch
import trl

from sft.data.collators import cut
from sft.lifecycle import run
from sft.training import checkpoint
from tests.conftest import make_settings
from tests.faults.fault_campaign import BASE, write_rows
from tests.integration.test_nonfinite import lines_of, quick_report, record_of  # noqa: F401

# 12 rows: every second step has only four of them.
JOB = (*BASE, "dataset=local", "trainer.max_steps=4", "samples.num_held_out=0", "dataset.eval_fraction=0",
       "lora.lora_dropout=0", "trainer.save_steps=1", "trainer.save_total_limit=4", "trainer.load_best_model_at_end=false",
       "trainer.gradient_accumulation_steps=null", "trainer.effective_batch_size=8", "trainer.learning_rate=1e-3")  # fmt: skip


def numbers_of(folder) -> list[float]:
    """Loss and gradient norm of each step, which show a gradient that was added twice at once; Adam hides it for long."""
    return [line[key] for line in lines_of(folder) if "loss" in line for key in ("loss", "grad_norm")]


@pytest.fixture
def short(tmp_path):
    """Composed settings of the job with these overrides."""
    return lambda *overrides: make_settings(*JOB, write_rows(tmp_path), *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(loss, gradient norm) of each step of a run with one pass of 8 rows a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft.report.page.bundled_charts", lambda: "")
        folder = tmp_path_factory.mktemp("whole")
        run(make_settings(*JOB, write_rows(folder), "trainer.per_device_train_batch_size=8"), folder / "run")
        folder = folder / "run"
    return numbers_of(folder)


@pytest.fixture
def plant(monkeypatch):
    """`plant(lambda call, rows: ...)`: a pass runs out of memory, after its gradients were added, where this is true."""
    original = trl.SFTTrainer.training_step

    def plant(fails):
        calls = itertools.count(1)

        def training_step(self, model, inputs, *args, **kwargs):
            rows = len(cut(inputs))
            loss = original(self, model, inputs, *args, **kwargs)
            if fails(next(calls), rows):
                raise torch.OutOfMemoryError("planted")
            return loss

        monkeypatch.setattr(trl.SFTTrainer, "training_step", training_step)

    return plant


@pytest.mark.parametrize("rows", [1, 4, "auto"])
def test_every_split_gives_the_same_losses(whole, short, tmp_path, rows):
    run(short(f"trainer.per_device_train_batch_size={rows}"), tmp_path / "run")
    assert numbers_of(tmp_path / "run") == pytest.approx(whole, abs=1e-5) and len(whole) == 8
    split = record_of(tmp_path / "run")["split"]
    per_pass = 2 if rows == "auto" else rows
    assert (split["per_device_train_batch_size"], split["gradient_accumulation_steps"]) == (per_pass, 8 // per_pass)


def test_a_pass_out_of_memory_is_made_again_with_half_the_rows(whole, short, tmp_path, plant, caplog):
    """Passes of 4 rows: the second one of step 3 fails, and the second piece of 2 rows in step 4."""
    plant(lambda call, rows: call == 5 or (call > 10 and rows > 1))
    folder = tmp_path / "run"
    result = run(short("trainer.per_device_train_batch_size=4"), folder)
    assert result.status == "finished" and numbers_of(folder) == pytest.approx(whole, abs=1e-5)
    lines = [line for line in lines_of(folder) if "loss" in line]
    assert [line.get("rows_at_once") for line in lines] == [None, None, 2, 1]
    assert record_of(folder)["metrics"]["rows_at_once"] == 1
    assert "Step 3: 4 rows at a time do not fit into the memory; it is repeated with 2" in caplog.text
    kept = [checkpoint.read_state(path)["rows_at_once"] for path in sorted((folder / "checkpoints").glob("checkpoint-*"))]
    assert kept == [None, None, 2, 1], "a run that goes on from there makes passes of the same size"


def test_a_single_row_that_does_not_fit_ends_the_run_and_says_what_helps(short, tmp_path, plant, caplog):
    plant(lambda call, rows: call > 2)
    result = run(short("trainer.per_device_train_batch_size=2"), tmp_path / "run")
    assert (result.status, result.exit_code) == ("failed", 1)
    assert record_of(tmp_path / "run")["error"]["type"] == "OutOfMemoryError"
    assert "not even one row at a time fits: trainer.gradient_checkpointing=true" in caplog.text


def test_held_out_rows_that_do_not_fit_are_evaluated_in_pieces(short, tmp_path, monkeypatch, caplog):
    job = ("dataset.eval_fraction=0.5", "trainer.per_device_eval_batch_size=4", "trainer.eval_steps=2", "trainer.max_steps=2")
    run(short(*job, "trainer.per_device_train_batch_size=2"), tmp_path / "whole")
    original = trl.SFTTrainer.prediction_step

    def prediction_step(self, model, inputs, *args, **kwargs):
        if len(cut(inputs)) > 1:
            raise torch.OutOfMemoryError("planted")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "prediction_step", prediction_step)
    assert run(short(*job, "trainer.per_device_train_batch_size=2"), tmp_path / "pieces").status == "finished"
    losses = [[line["eval_loss"] for line in lines_of(tmp_path / name) if "eval_loss" in line] for name in ("whole", "pieces")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 2
    assert caplog.text.count("Evaluation: ") == 2, "from 4 rows to 2, and to 1, once and for all"


def test_answers_that_do_not_fit_cost_no_training(short, tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("sft.generation.samples.generate", broken)
    result = run(short("samples.num_held_out=0", "samples.prompts=[why?]"), tmp_path / "run")
    assert result.status == "finished"
    assert all(f"Step {step}: too little memory for completions" in caplog.text for step in (0, 4))
