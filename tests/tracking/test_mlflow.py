"""MLflow's own store, read back with its client; and which store a run goes to."""

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout

from sft.config.schema import Settings, TrackerName, TrackingMode, TrackingSettings
from sft.errors import Refusal
from sft.storage.jsonio import append_jsonl, read_json
from sft.tracking import mlflow
from sft.tracking.base import check_tracking, make_trackers
from tests.conftest import make_settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow itself uses


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_RUN_GROUP", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder; making its database takes seconds."""
    pytest.importorskip("mlflow", reason="needs MLflow: pip install -e '.[mlflow]'")
    return tmp_path_factory.mktemp("work")


def tracked(**changes) -> Settings:
    return Settings(tracking=TrackingSettings(tracker=TrackerName.mlflow, **changes))


def answer(step: int, text: str) -> dict:
    return {"index": 0, "step": step, "prompt": "p", "completion": text, "finish": "eos", "reference": "r"}


def curve(client, number: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(number, key)]


def test_a_run_of_a_sweep_is_in_the_local_store_with_its_lines_samples_settings_and_ending(place, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep1")
    settings = make_settings("tracking=mlflow", "lora.r=4", "tracking.project=faq", "tracking.tags=[mine]")
    tracker = make_trackers(settings)
    facts = tracker.begin(settings, tmp_path, {"name": "n", "command": "python train.py"}, "transformers")
    assert facts["mode"] == "offline" and facts["url"] is None and facts["project"] == "faq" and facts["group"] == "sweep1"
    tracker.log({"step": 1, "loss": 2.5, "tokens": 40})
    tracker.log({"step": 1, "eval_loss": 2.25})
    tracker.describe({"parameters": 7})
    tracker.log_samples([answer(0, "base")], [])
    tracker.log_samples([answer(1, "later")], [answer(0, "base")])
    tracker.finish("stopped", {"eval_loss": 2.25}, "SIGINT at step 1")
    assert tracker._failed == set()
    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    run = client.get_run(facts["id"])
    assert client.get_experiment(run.info.experiment_id).name == "faq" and run.info.status == "KILLED"
    assert run.data.params["lora.r"] == "4" and run.data.params["parameters"] == "7"
    assert run.data.tags["group"] == "sweep1" and run.data.tags["mlflow.note.content"] == "python train.py"
    assert run.data.tags["tags"] == "transformers, mine" and run.data.tags["reason"] == "SIGINT at step 1"
    assert curve(client, facts["id"], "train/loss") == [(1, 2.5)] and curve(client, facts["id"], "eval/loss") == [(1, 2.25)]
    assert {*curve(client, facts["id"], "train/num_tokens")} == {(1, 40)}, "MLflow keeps one of two in one millisecond"
    assert run.data.metrics["final/eval_loss"] == 2.25
    table = read_json(Path(client.download_artifacts(facts["id"], "samples.json", str(tmp_path))))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["step"], row["base answer"], row["answer"]) for row in rows] == [(0, "base", "base"), (1, "base", "later")]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]


@pytest.mark.parametrize("written", [(1, 2, 3), (1,)], ids=["more than was kept", "less"])
def test_a_cut_run_goes_on_as_the_same_one_and_shows_each_step_once(written, place, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(place)
    before = None
    for steps in (written, (3, 4)):  # the checkpoint is that of step 2
        tracker = make_trackers(tracked())
        before = tracker.begin(tracked(), tmp_path, {"name": "n", "tracking": before}, "transformers")
        lines = [{"step": step, "loss": 10.0 - step} for step in (1, 2)] if steps == (3, 4) else []
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for step in steps:
            append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "loss": 10.0 - step})
            tracker.log({"step": step, "loss": 10.0 - step})
        tracker.trackers[0]._write_lines()
    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    assert curve(client, before["id"], "train/loss") == [(1, 9), (2, 8), (3, 7), (4, 6)]
    assert client.get_run(before["id"]).info.status == "RUNNING"
    tracker.finish("finished", {})
    assert tracker._failed == set() and client.get_run(before["id"]).info.status == "FINISHED"
    gone = make_trackers(tracked())
    facts = gone.begin(tracked(), tmp_path, {"name": "n", "tracking": {**before, "id": "0" * 32}}, "transformers")
    assert facts["id"] not in (before["id"], "0" * 32), "a store that does not have it begins another"


def test_a_server_that_takes_no_run_leaves_a_local_record(place, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(place)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hidden@127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        tracker = make_trackers(tracked())
        facts = tracker.begin(tracked(), tmp_path, {"name": "n"}, "transformers")
    tracker.log({"step": 1, "loss": 2.5})
    tracker.finish("finished", {})
    assert tracker._failed == set() and facts["mode"] == "offline" and facts["url"] is None
    assert "it goes on here" in caplog.text and "hidden" not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")  # which MLflow does not write any more
    assert make_trackers(tracked()).begin(tracked(), tmp_path, {"name": "n"}, "transformers")["id"] != facts["id"]


def test_the_address_of_a_run_opens_among_runs_and_not_among_traces(monkeypatch):
    client = SimpleNamespace(
        get_run=None,  # there was none before
        get_experiment_by_name=lambda name: SimpleNamespace(experiment_id="7"),
        create_run=lambda number, run_name: SimpleNamespace(info=SimpleNamespace(run_id="r"), data=SimpleNamespace(params={})),
        set_tag=lambda *args: None,
        log_batch=lambda *args, **options: None,
    )
    for name, found in (("mlflow", {"MlflowClient": lambda tracking_uri: client}), ("mlflow.entities", {"Param": tuple}),
                        ("mlflow.exceptions", {"MlflowException": OSError})):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**found))
    tracker = mlflow.MlflowTracker()
    tracker._begin("http://server:5000", False, TrackingSettings(), "n", [], {})
    assert tracker.facts["url"] == "http://server:5000/#/experiments/7/runs/r?workflowType=machine_learning"


def test_jobs_that_start_at_once_make_the_database_one_after_the_other(place, tmp_path, monkeypatch, caplog):
    class Client:
        def __init__(self, tracking_uri):
            with pytest.raises(Timeout):
                FileLock(tmp_path / "mlflow.db.lock").acquire(timeout=0)
            raise RuntimeError("the lock is held")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlflow.MlflowClient", Client)
    make_trackers(tracked()).begin(tracked(), tmp_path, {"name": "n"}, "transformers")
    assert "could not start (the lock is held)" in caplog.text


def test_a_server_is_asked_before_a_run_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = f"MLflow, sqlite:///{tmp_path}/mlflow.db"
    assert check_tracking(tracked()) == f"{local} (MLFLOW_TRACKING_URI names no server), experiment sft"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hidden@127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
        online = f"MLflow, http://...@127.0.0.1:{server.getsockname()[1]}, experiment ours"
        assert check_tracking(tracked()) == check_tracking(tracked(mode=TrackingMode.online)) == online
        assert check_tracking(tracked(mode=TrackingMode.offline)) == f"{local} (as set), experiment ours"
    assert check_tracking(tracked()) == f"{local} ({online[8:-17]} takes no connection), experiment ours"
    with pytest.raises(Refusal, match="takes no connection") as refused:
        check_tracking(tracked(mode=TrackingMode.online))
    assert refused.value.problems[0].fix == "tracking.mode=auto" and "hidden" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///theirs.db")
    assert check_tracking(tracked(mode=TrackingMode.offline)).startswith("MLflow, sqlite:///theirs.db (")
