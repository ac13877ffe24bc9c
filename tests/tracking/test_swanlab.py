"""SwanLab offline, uploaded with its own command to a server on loopback; online to that server; and a server that is gone."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from sft.config.schema import Settings, TrackerName, TrackingMode, TrackingSettings
from sft.errors import Refusal
from sft.storage.jsonio import append_jsonl
from sft.tracking import server as servers
from sft.tracking import swanlab
from sft.tracking.base import check_tracking, make_trackers
from tests.conftest import make_settings
from tests.tracking.fake_swanlab import KEY, serving

pytest.importorskip("swanlab", reason="needs SwanLab: pip install -e '.[swanlab]'")
# SwanLab leaves the file open of a run that cannot begin, or end.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own, in which nobody has logged in or set anything."""
    for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_RUN_GROUP", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    servers._silent.clear()
    return tmp_path


@pytest.fixture
def server(home):
    with serving() as server:
        (home / "home").mkdir()
        login = f"machine {server.url}\n\tlogin {server.url}\n\tpassword {KEY}\n"  # as swanlab login writes it
        (home / "home/.netrc").write_text(login, encoding="utf-8")
        yield server


def tracked(**changes) -> Settings:
    return Settings(tracking=TrackingSettings(tracker=TrackerName.swanlab, **changes))


def answer(step: int, text: str) -> dict:
    return {"index": 0, "step": step, "prompt": "p", "completion": text, "finish": "eos", "reference": "r"}


def track(settings: Settings, folder, before=None, steps=(1, 2)) -> dict:
    """What run.json keeps of a whole run."""
    tracker = make_trackers(settings)
    folder.mkdir(exist_ok=True)
    record = {"name": "n", "command": "python train.py", "tracking": before}
    tracker.begin(settings, folder, record, "transformers")
    tracker.describe({"parameters": 7})
    for step in steps:
        for line in ({"step": step, "loss": 10.0 - step, "tokens": 10 * step}, {"step": step, "eval_loss": 2.25}):
            append_jsonl(folder / "metrics.jsonl", line)
            tracker.log(line)
    tracker.log_samples([answer(steps[-1], "later")], [answer(0, "base")])
    tracker.finish("finished", {"eval_loss": 2.25}, "stopped early")
    assert tracker._failed == set()
    return tracker.state()


def upload(facts: dict) -> None:
    """Type the command that a run gives."""
    program, *words = shlex.split(facts["sync"])
    assert program == "swanlab"
    command = [sys.executable, "-c", "from swanlab.cli import cli; cli()", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def curve(server, key: str) -> list[tuple[int, float]]:
    return [(step, value) for name, step, value in server.scalars if name == key]


def value_of(server, *keys: str):
    found = server.profiles["config"][keys[0]]["value"]
    for key in keys[1:]:
        found = found[key]
    return found


def test_an_offline_run_is_whole_once_it_is_uploaded_by_the_command_that_it_gives(home, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep1")
    settings = make_settings("tracking=swanlab", "tracking.mode=offline", "lora.r=4", "tracking.tags=[mine]")
    facts = track(settings, home / "run")
    assert facts["mode"] == "offline" and facts["url"] is None and server.experiments == [] and capfd.readouterr().out == ""
    upload(facts)
    (begun,) = server.experiments
    assert begun["cuid"] == facts["id"] and begun["cluster"] == "sweep1" and begun["description"] == "python train.py"
    assert [label["name"] for label in begun["labels"]] == ["transformers", "mine"] and begun["name"] == "n"
    assert curve(server, "train/loss") == [(1, 9), (2, 8)] and curve(server, "eval/loss") == [(1, 2.25), (2, 2.25)]
    assert curve(server, "train/global_step") == [(1, 1), (2, 2)] and curve(server, "train/num_tokens") == [(1, 10), (2, 20)]
    assert value_of(server, "lora", "r") == 4 and value_of(server, "parameters") == 7
    assert value_of(server, "final", "eval_loss") == 2.25 and value_of(server, "reason") == "stopped early"
    (table,) = server.files.values()
    assert b'"base answer": "base", "answer": "later"' in table and server.states == ["FINISHED"]
    kept = b"".join(path.read_bytes() for path in home.glob("run/**/*") if path.is_file())
    assert KEY.encode() not in kept, "the key is in no file"


def test_the_further_folder_of_a_run_that_was_cut_offline_has_all_of_it(home, server):
    settings = tracked(mode=TrackingMode.offline)
    first = track(settings, home / "run")
    (lost,) = (home / "run/swanlab").glob("run-*")
    shutil.rmtree(lost)  # as a killed SwanLab loses the end of its file
    facts = track(settings, home / "run", first, (3,))
    assert facts["id"] == first["id"]
    upload(facts)
    assert curve(server, "train/loss") == [(1, 9), (2, 8), (3, 7)] and len(server.files) == 2
    assert curve(server, "train/num_tokens") == [(1, 10), (2, 20), (3, 30)]


def test_an_online_run_leaves_ctrl_c_to_the_run_and_goes_on_as_the_same_one(home, server, monkeypatch):
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    seen = []
    begin = swanlab.SwanlabTracker._begin

    def watched(*given):
        begin(*given)
        seen.append((signal.getsignal(signal.SIGINT), sys.excepthook))

    monkeypatch.setattr(swanlab.SwanlabTracker, "_begin", watched)
    assert check_tracking(tracked()) == "SwanLab online, project sft"
    facts = track(tracked(), home / "run")
    assert facts["mode"] == "online" and facts["url"] == f"{server.url}/@me/sft/runs/{facts['id']}" and facts["sync"] is None
    again = track(tracked(), home / "run", facts, (2, 3))
    assert again["id"] == facts["id"] and [run["cuid"] for run in server.experiments] == [facts["id"]] * 2
    assert curve(server, "train/loss") == [(1, 9), (2, 8), (3, 7)] and server.states == ["FINISHED", "FINISHED"]
    assert seen == [(handler, hook)] * 2 and signal.getsignal(signal.SIGINT) is handler and sys.excepthook is hook


def test_a_server_that_does_not_know_the_key_leaves_an_offline_record(home, server, caplog):
    server.knows_the_key = False
    facts = track(tracked(), home / "run")
    assert facts["mode"] == "offline" and "SwanLab could not start" in caplog.text and "it goes on offline" in caplog.text
    assert list(home.glob("run/swanlab/run-*/*.swanlab"))


def test_a_server_that_is_gone_at_the_end_is_not_waited_for(home, server, monkeypatch, caplog):
    monkeypatch.setattr(swanlab, "UPLOAD_SECONDS", 1)
    threads = threading.active_count()
    settings = tracked()
    tracker = make_trackers(settings)
    tracker.begin(settings, home / "run", {"name": "n"}, "transformers")
    server.answers = False
    tracker.log({"step": 1, "loss": 9.0})
    tracker.finish("finished", {})
    assert tracker.state()["sync"].startswith("swanlab sync --id ") and "did not take all of the run" in caplog.text
    server.answers = True
    server.wake.set()
    for thread in threading.enumerate()[threads:]:
        thread.join(10)


def test_what_is_set_counts_before_swanlabs_own_settings(home, monkeypatch):
    assert check_tracking(tracked(project="faq")) == "SwanLab offline (no API key), project faq"
    with pytest.raises(Refusal) as refused:
        check_tracking(tracked(mode=TrackingMode.online))
    assert [problem.fix for problem in refused.value.problems] == ["swanlab login   or   tracking.mode=offline"]
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    monkeypatch.setenv("SWANLAB_API_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("SWANLAB_PROJECT_NAME", "theirs")
    assert check_tracking(tracked()) == "SwanLab offline (http://127.0.0.1:1 takes no connection), project theirs"
    monkeypatch.setenv("SWANLAB_MODE", "disabled")
    assert check_tracking(tracked()) == "the run folder alone: SwanLab is switched off (SwanLab's own mode is disabled)"
    assert track(tracked(), home / "run") == {"tracker": "swanlab", "mode": "disabled", "url": None, "sync": None}
    assert [path.name for path in (home / "run").iterdir()] == ["metrics.jsonl"]
    monkeypatch.setenv("SWANLAB_MODE", "nonsense")
    with pytest.raises(Refusal, match="SwanLab refuses its own settings"):
        check_tracking(tracked())
