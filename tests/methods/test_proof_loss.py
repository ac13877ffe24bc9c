"""The loss that exports are compared with: of the weights in memory, measured once."""

import pytest

from sft.lifecycle import run
from sft.methods import sft as method
from sft.storage.jsonio import read_json
from tests.conftest import SMALL, make_settings

JOB = (*SMALL, "trainer=debug", "trainer.max_steps=2", "trainer.eval_steps=1", "trainer.save_steps=1", "samples.num_held_out=0")


@pytest.mark.parametrize("more, measured", [((), 0), (("trainer.learning_rate=60", "trainer.warmup_steps=0"), 1)],
                         ids=["the last weights", "earlier ones"])  # fmt: skip
def test_an_evaluation_of_the_kept_weights_is_not_made_again(more, measured, tmp_path, monkeypatch):
    calls, mean_loss = [], method.mean_loss
    monkeypatch.setattr(method, "mean_loss", lambda ctx, trainer: calls.append(mean_loss(ctx, trainer)) or calls[-1])
    assert run(make_settings(*JOB, *more), tmp_path).status == "finished"
    metrics = read_json(tmp_path / "run.json")["metrics"]
    assert (metrics["kept_step"] != 2, len(calls)) == (bool(measured), measured)
    assert metrics["proof_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)  # fewer rows held out than are compared
