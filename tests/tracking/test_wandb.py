"""Where W&B is asked for and as what: its own login, settings files and environment; and a record when it breaks down."""

import http.server
import importlib
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from sft.config.destinations import check_destinations, mark
from sft.config.rules import check_settings, warnings_for
from sft.config.schema import Settings, TrackerName, TrackingMode, TrackingSettings
from sft.preflight import checks
from sft.preflight.findings import Found
from sft.processes import child_environment
from sft.runs.resume import read_record
from sft.storage.jsonio import append_jsonl, read_json, read_lines, write_json
from sft.sweep import publish
from sft.tracking import wandb
from sft.tracking.base import Trackers, make_trackers
from sft.tracking.wandb import choose_mode, has_api_key, place
from sft.training.metrics import Recorder
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
    tracker = make_trackers(tracked())
    tracker.start(tracked(tags=["c"]), home, "ours", ["tiny", "x" * 72])
    run = tracker.trackers[0].run
    assert run.name == "mine" and set(run.tags) == {"tiny", "a", "b", "c", "x" * 64}, "W&B takes no tag over 64 characters"
    assert run.project == tracker.state()["project"] == "faq"
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
    assert problem_of() == "W&B offline (http://127.0.0.1:1 takes no connection), project sft; the run logs how to upload it"
    monkeypatch.setenv("WANDB_PROJECT", "team/faq")
    assert "Invalid project name 'team/faq'" in problem_of() and "tracking=none" in problem_of()
    assert "export WANDB_ENTITY=team WANDB_PROJECT=faq" in problem_of()


def test_online_in_the_environment_is_asked_for_as_well_and_a_sweep_of_wandbs_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    found = Found()
    checks.check_tracking(found, tracked())
    assert [(p.what, p.fix) for p in found.problems] == [("WANDB_MODE=online", "wandb login   or   tracking.mode=offline")]
    monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
    assert wandb.check(TrackingSettings(mode=TrackingMode.offline)).endswith(
        "the W&B sweep sw33p hears of it once it is uploaded"
    )


def test_group_notes_and_job_type_of_the_environment_reach_the_run_and_what_is_set_comes_first(home, monkeypatch):
    for name, value in {"RUN_GROUP": "night", "NOTES": "why", "JOB_TYPE": "eval", "MODE": "offline"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    entries = []
    for settings in (tracked(), tracked(group="set", notes="typed")):
        tracker = make_trackers(settings)
        tracker.begin(settings, home, {"command": "python train.py"}, "transformers")
        run = tracker.trackers[0].run
        entries.append((run.group, run.notes, run.job_type))
        tracker.finish("finished", {})
    assert entries == [("night", "why", "eval"), ("set", "typed", "eval")]


def test_a_proxy_before_the_server_is_what_has_to_take_the_connection(monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    assert not wandb._reachable("http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert wandb._reachable("http://wandb.invalid")
    server.server_close()


@pytest.mark.parametrize("switch", [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_a_wandb_that_is_switched_off_writes_nothing(home, monkeypatch, switch):
    monkeypatch.setenv(*switch)
    found, tracker = Found(), make_trackers(tracked())
    checks.check_tracking(found, tracked())
    assert found.lines[0].text == f"the run folder alone: W&B is switched off ({'='.join(switch)})"
    tracker.start(tracked(), home, "n", [])
    tracker.log({"step": 1, "loss": 1.0})
    tracker.log_samples([answer(1, "a")], [])
    tracker.finish("finished", {})
    publish.track_summary(home, tracked())
    assert tracker.state()["mode"] == "disabled" and list(home.iterdir()) == []
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
    own, waits = importlib.import_module("wandb").Settings, iter((3, 60))  # W&B gives the server up after a minute
    monkeypatch.setattr("wandb.Settings", lambda **given: own(**given | {"init_timeout": next(waits)}))
    tracker = make_trackers(tracked())
    tracker.start(tracked(mode=TrackingMode.online), home, "n", [])
    tracker.log({"step": 1, "loss": 2.5})
    tracker.finish("finished", {})
    server.shutdown()
    server.server_close()
    assert tracker.state()["mode"] == "offline" and "it goes on offline" in caplog.text
    (folder,) = home.glob("wandb/offline-run-*")
    assert [line["train/loss"] for line in read_back(folder)] == [2.5]


def test_a_wandb_that_dies_in_the_middle_goes_on_offline(home, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = make_trackers(tracked())
    tracker.start(tracked(), home, "n", [])
    tracker.log({"step": 1, "loss": 2.5})
    tracker.log_samples([answer(0, "base")], [])
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb"):
            child.kill()
            child.wait(10)
    (first,) = home.glob("wandb/offline-run-*")
    first.rename(home / "first")  # the second one may begin in the same second
    for step in (2, 3, 4):
        tracker.log({"step": step, "loss": 2.0})
    tracker.log_samples([answer(4, "later")], [answer(0, "base")])
    tracker.finish("finished", {})
    assert "it goes on offline" in caplog.text
    (second,) = home.glob("wandb/offline-run-*")
    lines = read_back(second)
    assert (
        lines[-2]["train/loss"] == 2.0 and lines[-2]["train/global_step"] == 4 and lines[-1]["_step"] == lines[-2]["_step"] + 1
    )
    (table,) = second.glob("files/media/table/*.json")
    assert [row[2:4] for row in json.loads(table.read_text(encoding="utf-8"))["data"]] == [["base", "base"], ["base", "later"]]


def test_a_wandb_that_dies_while_the_model_is_loaded_goes_on_offline_with_what_is_known_then(home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = make_trackers(tracked())
    tracker.begin(tracked(), home, {"name": "n"}, "transformers")
    first = tracker.trackers[0].run

    def broken(*given, **named):
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(type(first.config), "update", broken)
    tracker.describe({"parameters": 7})
    monkeypatch.undo()
    assert tracker.trackers[0].run is not first and tracker.trackers[0].run.config["parameters"] == 7
    tracker.finish("finished", {})


def test_none_asks_wandb_for_nothing(monkeypatch):
    monkeypatch.setattr(wandb, "wandb_settings", lambda: pytest.fail("W&B was asked"))
    settings = tracked(tracker=TrackerName.none)
    found, tracker = Found(), make_trackers(settings)
    checks.check_tracking(found, settings)
    tracker.start(settings, Path(), "n", [])
    assert tracker.trackers == [] and tracker.state() == {"mode": "none", "url": None, "sync": None}
    assert found.lines[0].text == "the run folder alone"


VERBS = ("describe", "start", "log", "log_samples", "finish", "state")


class Lines:
    """A tracker that keeps what it is told; it raises in `breaks`."""

    def __init__(self, name: str, breaks: str = ""):
        self.name, self.breaks, self.told = name, breaks, []

    def _note(self, verb: str, *given) -> None:
        self.told.append((verb, *given))
        if verb == self.breaks:
            raise RuntimeError(f"{verb} is broken")

    def start(self, settings, folder, name, tags, before):
        self._note("start", name, before)

    def describe(self, facts):
        self._note("describe", facts)

    def log(self, metrics):
        self._note("log", dict(metrics))
        metrics.clear()  # it is the tracker's own copy

    def log_samples(self, lines, earlier):
        self._note("log_samples", len(lines), len(earlier))

    def finish(self, status, metrics, reason):
        self._note("finish", status)

    def state(self):
        self._note("state")
        return {"mode": "online", "url": f"http://{self.name}", "sync": None, "run_id": 7}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_tracker_that_raises_is_left_out_with_one_warning_and_harms_no_other(verb, order, caplog):
    good, broken = Lines("good"), Lines("broken", verb)
    both = Trackers([good, broken] if order == "after" else [broken, good])
    both.describe({})
    both.start(Settings(), Path(), "run", ["tiny"])
    line = {"step": 1, "loss": 2.0}
    for _ in range(2):
        both.log(line)
        both.log_samples([answer(1, "a")], [])
        both.log_samples([], [])
    facts = both.state()
    both.finish("finished", {"loss": 2.0})
    assert line == {"step": 1, "loss": 2.0}
    assert [call[0] for call in good.told] == [
        "describe",
        "start",
        "log",
        "log_samples",
        "log",
        "log_samples",
        "state",
        "finish",
    ]
    (warning,) = [r.getMessage() for r in caplog.records]
    assert warning.startswith("tracking=broken could not ") and f"({verb} is broken)" in warning
    calls = [call[0] for call in broken.told if call[0] != "state"]
    assert calls.count(verb) == (0 if verb == "state" else 1) and (verb == "state" or calls[-1] == verb)
    assert (facts if order == "after" else facts["good"])["url"] == "http://good", "and run.json has it"


def test_a_run_whose_second_tracker_is_broken_is_as_it_was_without(home):
    """Recorder and all: metrics.jsonl has each line, and so has the first tracker."""
    good = Lines("good")
    recorder = Recorder(home, Trackers([good, *(Lines(f"broken_{verb}", verb) for verb in VERBS)]))
    recorder.tracking.start(Settings(), home, "run", [])
    for step in (1, 2, 3):
        recorder.add({"step": step, "loss": 3.0 - step})
    recorder.tracking.finish("finished", recorder.final)
    assert [line["step"] for line in read_lines(home / "metrics.jsonl")] == [1, 2, 3] and recorder.final["loss"] == 0.0
    assert [call[1]["step"] for call in good.told if call[0] == "log"] == [1, 2, 3] and good.told[-1] == ("finish", "finished")


def test_each_tracker_goes_on_with_its_own_facts_of_run_json(home):
    kept = Trackers([Lines("first"), Lines("second")]).state()
    assert kept["tracker"] == "first" and kept["second"]["url"] == "http://second"
    write_json(home / "run.json", {"tracking": kept})
    before, first, second, third = read_json(home / "run.json")["tracking"], Lines("first"), Lines("second"), Lines("wandb")
    Trackers([first, second, third]).start(Settings(), home, "run", [], before)
    assert [tracker.told[0][2].get("run_id") for tracker in (first, second, third)] == [7, 7, None]
    assert first.told[0][2]["url"] == "http://first" and second.told[0][2]["url"] == "http://second" and third.told[0][2] == {}


def test_wandbs_facts_stand_in_run_json_as_they_always_did(home, monkeypatch):
    """A run that is cut twice offline counts its lines on: W&B takes none below the number that it has."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, before = home / "run", None
    folder.mkdir()
    for session in range(3):
        tracker = make_trackers(tracked())
        tracker.start(tracked(), folder, "n", [], before)
        facts = tracker.state()
        assert set(facts) == {"mode", "url", "sync", "id", "project", "entity", "group", "lines"}
        assert facts["lines"] == 2 * session * (session + 1) // 2, "and no session's lines lie over another's"
        for step in (1, 2):
            append_jsonl(folder / "metrics.jsonl", {"step": step})
            tracker.log({"step": step})
        tracker.finish("stopped", {})
        write_json(folder / "run.json", {"tracking": facts})
        before = read_record(folder)["tracking"]


def test_a_child_does_not_look_for_the_service_of_its_parent(monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/tmp/gone/socket")
    assert "WANDB_SERVICE" not in child_environment() and child_environment(WANDB_SERVICE="x")["WANDB_SERVICE"] == "x"


def test_an_adapter_is_not_sent_where_there_is_none_and_a_folder_from_elsewhere_does_not_decide_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    (problem,) = check_settings(make_settings("lora=none", "trainer.learning_rate=1e-5", "tracking.log_adapter=true"))
    assert problem.fix == "tracking.log_adapter=false"
    assert check_settings(make_settings("tracking.log_adapter=true")) == []
    sending = tracked(log_adapter=True)
    (problem,) = check_destinations(sending, {"destinations_mark": mark(tracked())}, [], "resume=outputs/r")
    assert "resume=outputs/r tracking.log_adapter=true" in problem.fix
    assert check_destinations(sending, {"destinations_mark": mark(sending)}, [], "resume=outputs/r") == []
    (warning,) = warnings_for(make_settings("tracking=none", "tracking.log_adapter=true"))
    assert warning == "tracking.log_adapter=true is ignored: tracking=none."


@pytest.mark.parametrize("words, fix", [
    (["tracking.entity=team/proj"], "tracking.entity=team tracking.project=proj"),
    (['tracking.entity="a b/c"'], "tracking.entity=a-b-c"),
    ([f"tracking.name={'n' * 129}"], f"tracking.name={'n' * 128}"),
    ([f"tracking.group={'g' * 129}"], f"tracking.group={'g' * 128}"),
    ([f"tracking.tags=[ok,{'t' * 65}]"], f"'tracking.tags=[ok,{'t' * 64}]'"),
])  # fmt: skip
def test_a_name_that_wandb_refuses_is_refused_with_what_can_be_typed(words, fix):
    (problem,) = check_settings(make_settings(*words))
    assert problem.fix == fix
    assert check_settings(make_settings(*shlex.split(fix))) == []
