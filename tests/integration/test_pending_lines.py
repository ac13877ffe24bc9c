"""On a GPU the line of a step is written while the next one is computed. Here the CPU does it that way, and nothing changes."""

import json
import signal

import pytest

from sft.lifecycle import run
from sft.training import metrics, trainer
from sft.training.nonfinite import NonFiniteSteps
from tests.conftest import make_settings
from tests.integration.test_nonfinite import quick_report  # noqa: F401
from tests.integration.test_padding_free import JOB

TIMES = ("tokens_per_second", "memory_gib")
OPTIONS = ("trainer.max_steps=7", "trainer.logging_steps=2", "trainer.eval_steps=3", "trainer.save_steps=3",
           "lora.lora_dropout=0", "samples.num_held_out=1", "samples.every_steps=3")  # fmt: skip


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("every", [1, 2])
def test_lines_written_late_are_the_same(tmp_path, monkeypatch, every):
    options = (*JOB, *OPTIONS, f"trainer.logging_steps={every}")
    at_once = run(make_settings(*options), tmp_path / "at_once")
    seen = []
    write = metrics.LogLine.__init__
    monkeypatch.setattr(
        metrics.LogLine, "__init__", lambda self, step, *a, **k: seen.append(step) or write(self, step, *a, **k)
    )
    monkeypatch.setattr(trainer, "writes_late", lambda device: True)
    late = run(make_settings(*options), tmp_path / "late")
    assert seen == list(range(every, 8, every)) and at_once.status == late.status == "finished"
    assert lines_of(tmp_path / "late") == lines_of(tmp_path / "at_once")


def test_a_run_that_stops_with_a_line_to_write_writes_it_and_goes_on(tmp_path, monkeypatch):
    whole = run(make_settings(*JOB, *OPTIONS, "trainer.logging_steps=1"), tmp_path / "whole")
    monkeypatch.setattr(trainer, "writes_late", lambda device: True)
    settings = make_settings(*JOB, *OPTIONS, "trainer.logging_steps=1")
    write = metrics.LogLine.__init__

    def interrupted(self, step, *args, **kwargs):
        write(self, step, *args, **kwargs)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.LogLine, "__init__", interrupted)
        stopped = run(settings, tmp_path / "late")
    assert stopped.status == "stopped" and [line["step"] for line in lines_of(tmp_path / "late") if "loss" in line][-1] == 5
    late = run(settings, tmp_path / "late")
    assert whole.status == late.status == "finished"
    assert lines_of(tmp_path / "late") == lines_of(tmp_path / "whole")


def test_a_run_that_fails_keeps_the_line_of_the_step_before(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "writes_late", lambda device: True)
    add = NonFiniteSteps.add

    def failing(self, loss, inputs):
        if self.trainer.state.global_step == 3:
            raise RuntimeError("planted")
        add(self, loss, inputs)

    monkeypatch.setattr(NonFiniteSteps, "add", failing)
    failed = run(make_settings(*JOB, "trainer.max_steps=5", "trainer.logging_steps=1"), tmp_path / "late")
    assert failed.status == "failed" and [line["step"] for line in lines_of(tmp_path / "late") if "loss" in line] == [1, 2, 3]
