"""Where W&B is asked for and as what: its own login, settings files and environment; and a record when it breaks down."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from sft.config.rules import check_settings
from sft.config.schema import Settings, Tracker, TrackingMode, TrackingSettings
from sft.preflight import checks
from sft.preflight.findings import Found
from sft.sweep import publish
from sft.tracking import wandb
from sft.tracking.wandb import Tracking, choose_mode, has_api_key, place
from tests.conftest import make_settings

WANDB = Path(sys.executable).with_name("wandb")
KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own, in which nobody has logged in or set anything."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tracked(**changes) -> Settings:
    return Settings(tracking=TrackingSettings(**changes))


def read_back(folder: Path) -> list[dict]:
    """The history of the W&B run in a folder, each line with W&B's own step."""
    (binary,) = folder.glob("*.wandb")
    shown = subprocess.run([WANDB, "leet", "inspect", "--json", binary], capture_output=True, text=True, timeout=60)
    records = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def answer(step: int, text: str) -> dict:
    return {"index": 0, "step": step, "prompt": "p", "completion": text, "finish": "eos", "reference": "r"}


@pytest.mark.parametrize("server", [None, "https://api.wandb.ai", "http://localhost:8080"])
def test_a_login_of_the_installed_wandb_is_found(home, monkeypatch, server):
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert not has_api_key() and choose_mode(TrackingMode.auto) == ("offline", "no API key")
    done = subprocess.run([WANDB, "login", "--no-verify", KEY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and KEY in (home / ".netrc").read_text(encoding="utf-8"), done.stderr
    assert has_api_key()
    monkeypatch.setattr(wandb, "_reachable", lambda server: True)
    assert choose_mode(TrackingMode.auto) == ("online", "") == choose_mode(TrackingMode.online)


def test_a_login_from_before_wandb_changed_its_server_still_counts(home):
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n", encoding="utf-8")
    assert has_api_key()


def test_a_server_in_wandbs_settings_file_is_the_one_that_is_asked(home, monkeypatch):
    (home / "wandb").mkdir()
    (home / "wandb/settings").write_text("[default]\nbase_url = http://127.0.0.1:1\nproject = faq\n", encoding="utf-8")
    (home / ".netrc").write_text(f"machine 127.0.0.1:1\n  login user\n  password {KEY}\n", encoding="utf-8")
    assert has_api_key() and place(TrackingSettings()) == (None, "faq")
    assert choose_mode(TrackingMode.auto) == ("offline", "http://127.0.0.1:1 takes no connection")


def test_what_is_set_counts_before_the_environment_and_that_before_the_default(monkeypatch):
    assert place(TrackingSettings()) == (None, "sft")
    monkeypatch.setenv("WANDB_PROJECT", "faq")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    assert place(TrackingSettings()) == ("team", "faq")
    assert place(TrackingSettings(), {"project": "begun", "entity": "with"}) == ("with", "begun"), "a resumed run stays there"
    assert place(TrackingSettings(project="typed", entity="me"), {"project": "begun"}) == ("me", "typed")


def test_name_and_tags_of_the_environment_reach_the_run(home, monkeypatch):
    for name, value in {"WANDB_NAME": "mine", "WANDB_TAGS": "a,b", "WANDB_PROJECT": "faq", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    tracker = Tracking()
    tracker.start(tracked(tags=["c"]), home, "ours", ["tiny"])
    assert tracker.run.name == "mine" and set(tracker.run.tags) == {"tiny", "a", "b", "c"}
    assert tracker.run.project == tracker.facts["project"] == "faq"
    tracker.finish("finished", {})


def test_online_that_cannot_be_had_is_refused_before_loading(monkeypatch):
    def problem_of(**changes) -> str:
        found = Found()
        checks.check_tracking(found, tracked(**changes))
        return "\n".join(f"{p.what} {p.why} {p.fix}" for p in found.problems) or found.lines[0].text

    assert "no API key. wandb login" in problem_of(mode=TrackingMode.online)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 takes no connection. tracking.mode=offline" in problem_of(mode=TrackingMode.online)
    assert problem_of() == "W&B offline (http://127.0.0.1:1 takes no connection), project sft; the run says how to upload it"
    monkeypatch.setenv("WANDB_PROJECT", "team/faq")
    assert "Invalid project name 'team/faq'" in problem_of() and "tracking=none" in problem_of()


def test_a_proxy_before_the_server_is_what_has_to_take_the_connection(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    assert not wandb._reachable("http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert wandb._reachable("http://wandb.invalid")
    server.server_close()


@pytest.mark.parametrize("switch", [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_a_wandb_that_is_switched_off_writes_nothing(home, monkeypatch, switch):
    monkeypatch.setenv(*switch)
    found, tracker = Found(), Tracking()
    checks.check_tracking(found, tracked())
    assert found.lines[0].text == f"the run folder alone: W&B is switched off ({'='.join(switch)})"
    tracker.start(tracked(), home, "n", [])
    tracker.log({"step": 1, "loss": 1.0})
    tracker.samples([answer(1, "a")])
    tracker.finish("finished", {})
    publish.track_summary(home, tracked())
    assert tracker.facts["mode"] == "disabled" and list(home.iterdir()) == []
    assert choose_mode(TrackingMode.offline)[0] == "offline", "what is set counts before"


def test_a_project_that_wandb_refuses_is_refused_with_what_can_be_typed():
    (problem,) = check_settings(make_settings("tracking.project=team/proj"))
    assert problem.fix == "tracking.entity=team tracking.project=proj"
    (other,) = check_settings(make_settings('tracking.project="a/b/c: 50%"'))
    assert other.fix == "tracking.project=a-b-c-50"
    for fix in (problem.fix, other.fix):
        assert check_settings(make_settings(*fix.split())) == []
    assert check_settings(make_settings("tracking=none", "tracking.project=team/proj")) == []


def test_an_online_run_that_cannot_begin_leaves_an_offline_record(home, monkeypatch, caplog):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = Tracking()
    tracker.start(tracked(mode=TrackingMode.online), home, "n", [])
    tracker.log({"step": 1, "loss": 2.5})
    tracker.finish("finished", {})
    server.shutdown()
    server.server_close()
    assert tracker.facts["mode"] == "offline" and "it goes on offline" in caplog.text
    (folder,) = home.glob("wandb/offline-run-*")
    assert [line["loss"] for line in read_back(folder)] == [2.5]


def test_a_wandb_that_dies_in_the_middle_goes_on_offline(home, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracking()
    tracker.start(tracked(), home, "n", [])
    tracker.log({"step": 1, "loss": 2.5})
    tracker.samples([answer(0, "base")])
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb"):
            child.kill()
            child.wait(10)
    (first,) = home.glob("wandb/offline-run-*")
    first.rename(home / "first")  # the second one may begin in the same second
    for step in (2, 3, 4):
        tracker.log({"step": step, "loss": 2.0})
    tracker.samples([answer(4, "later")])
    tracker.finish("finished", {})
    assert "it goes on offline" in caplog.text
    (second,) = home.glob("wandb/offline-run-*")
    lines = read_back(second)
    assert lines[-2]["loss"] == 2.0 and lines[-2]["step"] == 4 and lines[-1]["_step"] == lines[-2]["_step"] + 1
    (table,) = second.glob("files/media/table/*.json")
    assert [row[2:4] for row in json.loads(table.read_text(encoding="utf-8"))["data"]] == [["base", "base"], ["base", "later"]]


def test_none_asks_wandb_for_nothing(monkeypatch):
    monkeypatch.setattr(wandb, "wandb_settings", lambda: pytest.fail("W&B was asked"))
    Tracking().start(tracked(tracker=Tracker.none), Path(), "n", [])
