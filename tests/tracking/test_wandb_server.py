"""Runs that are online, with a W&B server on loopback: all of it arrives, and a server that dies costs no line."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.config.schema import Settings, TrackingMode, TrackingSettings
from sft.preflight import checks
from sft.preflight.findings import Found
from sft.storage.jsonio import append_jsonl
from sft.tracking import wandb
from sft.tracking.base import make_trackers
from tests.tracking.fake_wandb import KEY, Handler, serving, stop

ONLINE = Settings(tracking=TrackingSettings(mode=TrackingMode.online, group="faq"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that this user is logged in at."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    client = importlib.import_module("wandb")
    client.teardown()  # it reads its environment once a process
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        client.teardown()


def kept(folder: Path) -> str:
    """What W&B's own file of the run in a folder holds, as text."""
    (binary,) = folder.glob("wandb/run-*/*.wandb")
    shown = subprocess.run([Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", binary], capture_output=True,
                           text=True, timeout=60)  # fmt: skip
    return shown.stdout


def test_an_online_run_arrives_whole(server, tmp_path):
    found = Found()
    checks.check_tracking(found, ONLINE)
    assert found.lines[0].text == "W&B online, project sft" and not found.problems
    tracker = make_trackers(ONLINE)
    state = tracker.begin(ONLINE, tmp_path, {"name": "tiny", "command": "python train.py"}, "transformers")
    assert (state["mode"], state["sync"]) == ("online", None) and state["url"].startswith(f"{server.url}/me/sft/runs/")
    tracker.log({"step": 0, "eval_loss": 3.0})
    tracker.log({"step": 1, "loss": 2.5, "tokens": 12})
    tracker.finish("finished", {"eval_loss": 3.0})
    assert tracker.state()["sync"] is None
    begun = server.runs[0]
    assert (begun["displayName"], begun["groupName"]) == (f"tiny_{state['id']}", "faq")
    assert (begun["jobType"], begun["notes"]) == ("train", "python train.py")
    lines = [server.history[number] for number in sorted(server.history)]
    assert [line["train/global_step"] for line in lines] == [0, 1] and [line["train/num_tokens"] for line in lines] == [0, 12]
    assert "wandb-summary.json" in server.files


def test_the_adapter_and_the_alert_arrive_where_they_were_asked_for(server, tmp_path):
    settings = Settings(tracking=TrackingSettings(mode=TrackingMode.online, log_adapter=True, alert=True))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    tracker = make_trackers(settings)
    state = tracker.begin(settings, tmp_path, {"name": "tiny"}, "transformers")
    tracker.finish("stopped", {"eval_loss": 2.5}, "time limit at step 3")
    (adapter,) = server.artifacts
    assert (adapter["artifactCollectionName"], adapter["artifactTypeName"]) == (f"adapter-{state['id']}", "model")
    assert {alias["alias"] for alias in adapter["aliases"]} == {"latest", "best"}
    (alert,) = server.alerts
    assert (alert["text"], alert["severity"]) == ("time limit at step 3", "WARN")
    assert tracker.state()["sync"] is None


def test_an_online_run_that_goes_on_keeps_each_line_and_the_name_that_it_has_there(server, tmp_path):
    """What was logged after the last checkpoint is logged again, with other content, and W&B takes no number twice."""
    before, logged = None, []
    for session, steps in enumerate([(1, 2, 3), (3, 4)]):
        tracker = make_trackers(ONLINE)
        state = tracker.begin(ONLINE, tmp_path, {"name": "tiny", "tracking": before}, "transformers")
        assert state["mode"] == "online" and (before or state)["id"] == state["id"]
        for step in steps:
            logged.append((step, 10 * step + session))
            line = {"step": step, "loss": 2.0, "tokens": 10 * step + session}
            append_jsonl(tmp_path / "metrics.jsonl", line)
            tracker.log(line)
        tracker.finish("stopped", {}, "SIGINT")
        before = tracker.state()
        (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")  # back to the checkpoint
    lines = [server.history[number] for number in sorted(server.history)]
    assert [(line["train/global_step"], line["train/num_tokens"]) for line in lines] == logged
    assert [line["_step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [run["displayName"] for run in server.runs if run["displayName"]] == [f"tiny_{state['id']}"], "given once"


def test_a_key_that_the_server_does_not_know_and_a_server_of_something_else_are_refused_before_loading(server, monkeypatch):
    def refused() -> tuple[str, str]:
        found = Found()
        checks.check_tracking(found, ONLINE)
        (problem,) = found.problems
        return problem.why, problem.fix

    server.knows_the_key = False
    fix = "wandb login   or   tracking.mode=offline"
    assert refused() == (f"W&B cannot be online: {server.url} does not know the API key.", fix)
    monkeypatch.setattr(Handler, "do_POST", lambda handler: handler.send_error(404))
    assert refused() == (f"W&B cannot be online: {server.url} answers 404.", "tracking.mode=offline")
    assert wandb.check(TrackingSettings()) == "W&B online, project sft", "and without being asked for it is tried"


def test_a_server_that_dies_in_the_middle_leaves_the_whole_record_and_how_to_upload_it(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "UPLOAD_SECONDS", 4)
    tracker = make_trackers(ONLINE)
    tracker.begin(ONLINE, tmp_path, {"name": "tiny"}, "transformers")
    tracker.log({"step": 1, "loss": 2.5})
    stop(server)
    tracker.log({"step": 2, "loss": 2.25})
    began = time.monotonic()
    tracker.finish("finished", {"eval_loss": 2.125})
    assert time.monotonic() - began < 30, "the end of a run does not wait for a server that is gone"
    (folder,) = tmp_path.glob("wandb/run-*")
    assert tracker.state()["sync"] == f"wandb sync {folder.relative_to(tmp_path)}" and "Upload it later" in caplog.text
    text = kept(tmp_path)
    assert '"train/loss":2.5' in text and '"train/loss":2.25' in text and '"eval_loss":2.125' in text
    assert wandb.choose_mode(TrackingMode.auto) == ("offline", f"{server.url} takes no connection"), "and the next run is"
