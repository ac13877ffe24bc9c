"""Trackio's database, read back with its own reader."""

import json
import secrets

import pytest

from sft.config.schema import Settings, TrackerName, TrackingSettings
from sft.storage.jsonio import append_jsonl
from sft.tracking.base import check_tracking, make_trackers
from tests.conftest import make_settings


@pytest.fixture
def trackio(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    return pytest.importorskip("trackio", reason="needs Trackio: pip install -e '.[trackio]'")


@pytest.fixture
def project(trackio):
    """The name of one that is not there yet, and not any more after the test."""
    name = f"test-{secrets.token_hex(8)}"
    yield name
    trackio.delete_project(name, force=True)


def tracked(**changes) -> Settings:
    return Settings(tracking=TrackingSettings(tracker=TrackerName.trackio, **changes))


def answer(step: int, text: str) -> dict:
    return {"index": 0, "step": step, "prompt": "p", "completion": text, "finish": "eos", "reference": "r"}


def curve(lines: list[dict], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def test_a_run_is_there_with_its_lines_samples_settings_group_ending_and_alert(trackio, project, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep1")
    settings = make_settings("tracking=trackio", "lora.r=4", f"tracking.project={project}", "tracking.alert=true")
    tracker = make_trackers(settings)
    facts = tracker.begin(settings, tmp_path, {"name": "n", "command": "python train.py"}, "transformers")
    assert facts["mode"] == "offline" and facts["project"] == project and facts["id"].startswith("n_")
    tracker.describe({"parameters": 7})
    tracker.log({"step": 1, "loss": 2.5, "tokens": 40})
    tracker.log({"step": 1, "eval_loss": 2.25})
    tracker.log_samples([answer(1, "later")], [answer(0, "base")])
    tracker.finish("stopped", {"eval_loss": 2.25}, "SIGINT at step 1")
    assert tracker._failed == set() and capsys.readouterr().out == ""
    (run,) = trackio.Api().runs(project)
    assert run.name == facts["id"] and run.config["lora"]["r"] == 4 and run.config["parameters"] == 7
    assert run.config["_Group"] == "sweep1" and run.config["run"]["command"] == "python train.py"
    assert [(alert["level"], alert["text"]) for alert in run.alerts()] == [("warn", "SIGINT at step 1")]
    lines = trackio.SQLiteStorage.get_logs(project, run.name)
    assert curve(lines, "train/loss") == [(1, 2.5)] and curve(lines, "eval/loss") == [(1, 2.25)]
    assert curve(lines, "train/num_tokens") == [(1, 40), (1, 40)] and curve(lines, "final/eval_loss") == [(1, 2.25)]
    ((step, table),) = curve(lines, "samples")
    assert step == 1 and [(row["base answer"], row["answer"]) for row in table["_value"]] == [("base", "later")]
    assert lines[-1]["ending"]["_value"] == "stopped: SIGINT at step 1"


@pytest.mark.parametrize("written", [(1, 2, 3), (1,)], ids=["more than was kept", "less"])
def test_a_cut_run_goes_on_as_the_same_one_and_shows_each_step_once(written, trackio, project, tmp_path):
    settings, before = tracked(project=project), None
    for steps in (written, (3, 4)):  # the checkpoint is that of step 2
        tracker = make_trackers(settings)
        before = tracker.begin(settings, tmp_path, {"name": "n", "tracking": before}, "transformers")
        lines = [{"step": step, "loss": 10.0 - step} for step in (1, 2)] if steps == (3, 4) else []
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for step in steps:
            append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "loss": 10.0 - step})
            tracker.log({"step": step, "loss": 10.0 - step})
        tracker.trackers[0].run.finish()
    (run,) = trackio.Api().runs(project)
    lines = trackio.SQLiteStorage.get_logs(project, run.name)
    assert curve(lines, "train/loss") == [(1, 9), (2, 8), (3, 7), (4, 6)]


def test_a_run_waits_for_no_space_and_says_so(monkeypatch):
    assert check_tracking(tracked(project="faq")) == "Trackio on this machine, project faq"
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    said = "Trackio on this machine, project sft; TRACKIO_SPACE_ID is left aside: trackio sync uploads a project"
    assert check_tracking(tracked()) == said


def test_the_variables_that_send_a_run_elsewhere_are_left_aside(trackio, project, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:1/?write_token=hidden")
    tracker = make_trackers(tracked(project=project))
    tracker.begin(tracked(project=project), tmp_path, {"name": "n"}, "transformers")
    tracker.log({"step": 1, "loss": 2.5})
    tracker.finish("finished", {})
    assert tracker._failed == set() and len(trackio.Api().runs(project)) == 1
