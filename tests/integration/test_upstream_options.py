"""Options of TRL and transformers that are handed on act on the training, and leave the measuring of it alone."""

import pytest

from sft.export import exporter
from sft.lifecycle import run
from sft.runs.saved import settings_of
from sft.storage.jsonio import read_lines
from tests.conftest import SMALL, make_settings

QUICK = (*SMALL, "trainer=debug", "trainer.max_steps=3", "trainer.warmup_steps=0", "trainer.learning_rate=1e-2",
         "trainer.padding_free=false", "dataset.max_rows=8", "dataset.eval_fraction=0.25")  # fmt: skip


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(overrides)`: (the run's folder, its lines with a training loss, the held-out loss before the first step)."""

    def trained(*overrides):
        folder = tmp_path_factory.mktemp("options") / "run"
        assert run(make_settings(*QUICK, *overrides), folder).status == "finished"
        lines = read_lines(folder / "metrics.jsonl")
        held_out = next(line["eval_loss"] for line in lines if "eval_loss" in line)
        return folder, [line for line in lines if "loss" in line], held_out

    return trained


@pytest.fixture(scope="module")
def plain(train):
    return train()


def test_noise_on_the_embeddings_changes_the_losses_alone_and_a_schedule_keeps_its_floor(train, plain):
    schedule = ("trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.extra.lr_scheduler_kwargs={min_lr: 1e-3}")
    _, lines, held_out = train("trainer.extra.neftune_noise_alpha=50", *schedule)
    assert abs(lines[0]["loss"] - plain[1][0]["loss"]) > 0.01 and held_out == pytest.approx(plain[2], abs=1e-6)
    cosine = [0.001 + 0.009 * part for part in (1, 0.75, 0.25)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(cosine)


def test_smoothed_labels_act(train, plain):
    _, lines, _ = train("trainer.extra.loss_type=nll", "trainer.extra.label_smoothing_factor=0.2")
    assert abs(lines[0]["loss"] - plain[1][0]["loss"]) > 1e-3


def test_a_loss_of_ones_own_is_what_is_trained_by_and_its_export_holds(train, plain):
    folder, lines, _ = train("trainer.extra.loss_type=dft")
    assert abs(lines[0]["loss"] - plain[1][0]["loss"]) > 0.01
    settings, _ = settings_of(folder)
    settings.export.formats, settings.export.num_prompts = ["merged_16bit"], 1
    report = exporter.export_run(folder, settings)
    assert report["artifacts"]["merged_16bit"]["status"] == "ok", report["artifacts"]
