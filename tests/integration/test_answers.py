"""Answers that are given while the run goes on are those of the weights that they were asked of."""

import functools
import itertools

import pytest
import torch
import trl

from sft import checkpoints, samples
from sft import run as runs
from sft.run import run
from tests.integration.test_bad_numbers import lines_of, quick_report, record_of  # noqa: F401
from tests.integration.test_splits import short  # noqa: F401

ASKED = (
    "trainer.save_steps=4",
    "dataset.eval_fraction=0.25",
    "samples.prompts=[why?]",
    "samples.max_new_tokens=8",
    "trainer.per_device_train_batch_size=8",
)


@pytest.fixture
def later(monkeypatch):
    """As on a GPU, where answers are there when they are waited for and not before: what happened, in order."""
    events, generate = [], samples.generate

    def asked(model, tokenizer, prompts, settings, stop_ids, step, backend, check, later=False):
        events.append(f"asked at {step}")

        @functools.cache
        def wait():
            events.append(f"answered at {step}")
            return generate(model, tokenizer, prompts, settings, stop_ids, step, backend, check)()

        return wait

    def noted(owner, name, event):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: events.append(event) or original(*args, **kwargs))

    monkeypatch.setattr(samples, "generate", asked)
    noted(runs, "save_weights", "saved")
    noted(checkpoints, "writing", "checkpoint")
    noted(trl.SFTTrainer, "evaluation_loop", "evaluation")
    noted(trl.SFTTrainer, "training_step", "pass")
    return events


def test_they_are_waited_for_before_the_first_step_and_after_the_weights_are_saved(short, tmp_path, request):  # noqa: F811
    run(short(*ASKED), tmp_path / "whole")
    events = request.getfixturevalue("later")
    assert run(short(*ASKED), tmp_path / "run").status == "finished"
    begin = ["asked at 0", "evaluation", "answered at 0"]
    end = ["evaluation", "asked at 4", "checkpoint", "saved", "answered at 4"]
    middle = ["pass", "pass", "evaluation", "pass", "asked at 3", "answered at 3", "pass"]
    assert events == [*begin, *middle, *end]
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    lines = [[untimed(line) for line in lines_of(tmp_path / name)] for name in ("whole", "run")]
    assert lines[0] == lines[1] and [line["step"] for line in lines[1]] == [0, 0, 1, 2, 2, 3, 3, 4, 4, 4]


def test_the_last_ones_are_not_asked_for_before_the_best_weights_are_back(short, tmp_path, later, monkeypatch):  # noqa: F811
    original, calls = trl.SFTTrainer.prediction_step, itertools.count()

    def prediction_step(*args, **kwargs):  # each evaluation is worse than the one before
        loss, *others = original(*args, **kwargs)
        return (loss + next(calls), *others)

    monkeypatch.setattr(trl.SFTTrainer, "prediction_step", prediction_step)
    best = ("trainer.load_best_model_at_end=true", "trainer.eval_steps=2")
    assert run(short(*ASKED, *best), tmp_path / "run").status == "finished"
    assert record_of(tmp_path / "run")["metrics"]["kept_step"] == 2
    assert later[-5:] == ["evaluation", "checkpoint", "asked at 4", "saved", "answered at 4"]


def test_an_evaluation_that_runs_out_of_memory_waits_for_them(short, tmp_path, later, monkeypatch):  # noqa: F811
    original, calls = trl.SFTTrainer.prediction_step, itertools.count()

    def prediction_step(*args, **kwargs):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "prediction_step", prediction_step)
    assert run(short(*ASKED), tmp_path / "run").status == "finished"
    assert later[:4] == ["asked at 0", "evaluation", "answered at 0", "pass"]
    assert [line["step"] for line in lines_of(tmp_path / "run")][:3] == [0, 0, 1]


def test_they_are_kept_where_the_training_fails_before_its_first_step(short, tmp_path, later, monkeypatch):  # noqa: F811
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(trl.SFTTrainer, "prediction_step", broken)
    assert run(short(*ASKED), tmp_path / "run").status == "failed"
    assert later == ["asked at 0", "evaluation", "answered at 0"]
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0]


def untimed(line: dict) -> dict:
    """A line of metrics.jsonl without what differs between two equal runs."""
    return {key: value for key, value in line.items() if key not in ("tokens_per_second", "memory_gib")}
