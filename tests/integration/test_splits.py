"""However the rows of a step are split into passes, and whatever runs out of memory on the way, the losses are the same."""

import itertools
import json

import pytest
import torch
import trl

from sft import checkpoints
from sft.run import run
from tests.conftest import SMALL, make_settings
from tests.integration.test_bad_numbers import lines_of, quick_report, record_of  # noqa: F401

JOB = (*SMALL, "trainer.max_steps=4", "samples.num_held_out=0", "dataset.eval_fraction=0", "trainer.save_steps=2",
       "trainer.load_best_model_at_end=false", "trainer.effective_batch_size=8", "trainer.learning_rate=1e-3")  # fmt: skip


def losses(folder) -> list[float]:
    return [line["loss"] for line in lines_of(folder) if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of a run with one pass of 8 rows a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft.report.vl_convert.javascript_bundle", lambda *args: "")
        folder = tmp_path_factory.mktemp("whole")
        run(make_settings(*JOB, "trainer.per_device_train_batch_size=8"), folder)
    return losses(folder)


@pytest.fixture
def plant(monkeypatch):
    """`plant(lambda call, rows: ...)`: a pass runs out of memory, after its gradients were added, where this is true."""
    original = trl.SFTTrainer.training_step

    def plant(fails):
        calls = itertools.count(1)

        def training_step(self, model, inputs, *args, **kwargs):
            rows = len(inputs["input_ids"])
            loss = original(self, model, inputs, *args, **kwargs)
            if fails(next(calls), rows):
                raise torch.OutOfMemoryError("planted")
            return loss

        monkeypatch.setattr(trl.SFTTrainer, "training_step", training_step)

    return plant


@pytest.mark.parametrize("rows", [1, 4, "auto"])
def test_every_split_gives_the_same_losses(whole, tmp_path, rows):
    run(make_settings(*JOB, f"trainer.per_device_train_batch_size={rows}"), tmp_path)
    assert losses(tmp_path) == pytest.approx(whole, abs=1e-5) and len(whole) == 4
    split = record_of(tmp_path)["split"]
    per_pass = 2 if rows == "auto" else rows
    assert (split["per_device_train_batch_size"], split["gradient_accumulation_steps"]) == (per_pass, 8 // per_pass)


def test_a_pass_out_of_memory_is_made_again_with_half_the_rows(whole, tmp_path, plant, caplog):
    """Two passes of 4 rows a step: the second one of step 2 fails, and later a piece of 2 rows in step 3."""
    plant(lambda call, rows: call == 4 or (call > 10 and rows > 1))
    result = run(make_settings(*JOB, "trainer.per_device_train_batch_size=4"), tmp_path)
    assert result.status == "finished" and losses(tmp_path) == pytest.approx(whole, abs=1e-5)
    shown = [line.get("rows_at_once") for line in lines_of(tmp_path) if "loss" in line]
    assert shown == [None, 2, 1, 1] and record_of(tmp_path)["metrics"]["rows_at_once"] == 1
    assert "Step 2: 4 rows at a time do not fit into the memory; it is made again with 2" in caplog.text
    kept = [checkpoints.read_state(path)["rows_at_once"] for path in sorted((tmp_path / "checkpoints").glob("checkpoint-*"))]
    assert kept == [2, 1], "a run that goes on from there makes passes of the same size"


def test_a_single_row_that_does_not_fit_ends_the_run_and_says_what_helps(tmp_path, plant, capfd):
    plant(lambda call, rows: call > 2)
    result = run(make_settings(*JOB, "trainer.per_device_train_batch_size=2"), tmp_path)
    assert (result.status, result.exit_code) == ("failed", 1)
    error = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["error"]
    assert error["type"] == "OutOfMemoryError"
