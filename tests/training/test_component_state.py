"""What a checkpoint keeps: gathered from components by their names, given back to them, and read from older versions."""

import json
from types import SimpleNamespace

from transformers import EarlyStoppingCallback

from sft.config.schema import TrainerSettings
from sft.training import checkpoint
from sft.training.metrics import Recorder
from sft.training.nonfinite import NonFiniteSteps
from sft.training.oom import OomRetry
from sft.training.step_end import StepEnd
from sft.training.time_budget import TimeBudget
from sft.training.trainer import Loop, ResumableTrainer

OLD_STATE = {
    "tokens": 410, "seconds": 2.5, "logged": {"tokens": 300, "seconds": 2.0}, "loss_since_log": 1.25, "last_log": 3,
    "patience_counter": 1, "bad_steps": 2, "rows_at_once": 4, "needs": {"save": 0.5}, "due": ["samples"], "save_due": True,
    "final": {"loss": 3.0, "eos_share_start": 0.5}, "eval_step": 3, "bytes": {"metrics.jsonl": 0, "samples.jsonl": 0},
}  # fmt: skip
"""A run_state.json from before it had components."""


def write_state(folder, state):
    """The checkpoint of step 3 with such a run_state.json."""
    place = checkpoint.place_of(folder, 3)
    place.mkdir(parents=True)
    (place / checkpoint.STATE).write_text(json.dumps(state))
    return place


def components_of(folder):
    """All components of a run, with a stand-in for TRL's trainer."""
    callbacks = [EarlyStoppingCallback(2, 0.0)]
    trainer = SimpleNamespace(tokens_seen=0, _tr_loss=0.0, _globalstep_last_logged=0)
    trainer.callback_handler = SimpleNamespace(callbacks=callbacks)
    trainer.nonfinite, trainer.oom_retry = NonFiniteSteps(trainer, None, 0), OomRetry(trainer)
    loop = Loop(folder, None, Recorder(folder, None), TimeBudget(TrainerSettings()), None, None)
    return loop.components() | ResumableTrainer.components(trainer)


def test_a_checkpoint_of_an_older_version_gives_every_component_what_it_kept(tmp_path):
    place = write_state(tmp_path, OLD_STATE)
    components = components_of(tmp_path)
    assert set(components) == set(checkpoint.FLAT), "each flat key has a component, and none is forgotten"
    checkpoint.load_components(place, components)
    again = checkpoint.gather_state(components)
    states = again.pop("components")
    assert again == {key: value for key, value in OLD_STATE.items() if key != "bytes"}, "what scripts read is still there"
    assert states["clock"] == {"seconds": 2.5, "logged": {"tokens": 300, "seconds": 2.0}}
    assert components["time_budget"].earlier == {"save": 0.5} and components["log"].trainer._tr_loss == 1.25


def test_the_oldest_checkpoints_know_neither_rows_at_once_nor_times(tmp_path):
    old = {key: value for key, value in OLD_STATE.items() if key not in ("rows_at_once", "needs")}
    place = write_state(tmp_path, old)
    components = components_of(tmp_path)
    checkpoint.load_components(place, components)
    assert components["oom_retry"].rows is None and components["time_budget"].earlier == {}
    assert components["nonfinite_steps"].count == 2


def test_a_component_reads_what_it_wrote_and_a_new_one_begins_anew(tmp_path):
    class Counted:
        def __init__(self, count):
            self.count = count

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    with checkpoint.writing(tmp_path, 1, checkpoint.gather_state({"mine": Counted(7)})) as work:
        (work / "model").write_text("weights")
    mine, new = Counted(0), Counted(0)
    checkpoint.restore_run(tmp_path, checkpoint.place_of(tmp_path, 1), {"mine": mine, "new": new})
    assert (mine.count, new.count) == (7, 0)


def test_a_run_that_goes_on_from_a_checkpoint_that_was_due_saves_none_at_its_first_step():
    due, given_up, resumed = StepEnd(save_due=True), StepEnd(due=["evaluate"], save_due=True), StepEnd()
    resumed.load_state_dict(due.state_dict())
    assert not resumed.pending and not resumed.save_due
    resumed.load_state_dict(given_up.state_dict())
    assert resumed.due == ["evaluate"] and resumed.save_due, "what a stop gave up is made up for, and saved"
