"""When a run has its prompts answered, and by which weights."""

import itertools
import json

import pytest
import trl

from sft import lifecycle as sft_run
from sft.generation import samples
from sft.lifecycle import run
from sft.training import trainer as training_trainer
from tests.integration.test_nonfinite import lines_of, quick_report, record_of  # noqa: F401
from tests.integration.test_oom import short  # noqa: F401

ASKED = (
    "trainer.save_steps=4",
    "dataset.eval_fraction=0.25",
    "samples.prompts=[why?]",
    "samples.max_new_tokens=8",
    "trainer.per_device_train_batch_size=8",
)


@pytest.fixture
def events(monkeypatch):
    """What happened, in order."""
    events, generate = [], samples.generate

    def answered(model, tokenizer, prompts, settings, stop_ids, step, *rest):
        events.append(f"answered at {step}")
        return generate(model, tokenizer, prompts, settings, stop_ids, step, *rest)

    def noted(owner, name, event):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: events.append(event) or original(*args, **kwargs))

    monkeypatch.setattr(samples, "generate", answered)
    noted(sft_run, "save_weights", "saved")
    noted(training_trainer, "writing", "checkpoint")
    noted(trl.SFTTrainer, "evaluation_loop", "evaluation")
    noted(trl.SFTTrainer, "training_step", "pass")
    return events


def test_they_are_given_before_the_first_step_and_after_the_weights_are_saved(short, tmp_path, events):  # noqa: F811
    assert run(short(*ASKED), tmp_path / "run").status == "finished"
    middle = ["pass", "pass", "evaluation", "pass", "answered at 3", "pass"]
    end = ["evaluation", "checkpoint", "saved", "answered at 4"]
    assert events == ["evaluation", "answered at 0", *middle, *end]
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 3, 3, 4, 4, 4]
    assert [i for i, line in enumerate(lines) if "eos_share" in line] == [1, 6, 9]
    said = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in said] == [0, 3, 4]


def test_the_last_ones_are_given_by_the_best_weights(short, tmp_path, events, monkeypatch):  # noqa: F811
    original, calls = trl.SFTTrainer.prediction_step, itertools.count()

    def prediction_step(*args, **kwargs):  # each evaluation is worse than the one before
        loss, *others = original(*args, **kwargs)
        return (loss + next(calls), *others)

    monkeypatch.setattr(trl.SFTTrainer, "prediction_step", prediction_step)
    best = ("trainer.load_best_model_at_end=true", "trainer.eval_steps=2")
    assert run(short(*ASKED, *best), tmp_path / "run").status == "finished"
    assert record_of(tmp_path / "run")["metrics"]["kept_step"] == 2
    assert events[-4:] == ["evaluation", "checkpoint", "saved", "answered at 4"]
