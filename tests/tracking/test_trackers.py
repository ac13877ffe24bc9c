"""Which trackers a run has: one by name or several at once, what they need, and what they ignore."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from sft.cli.check import check_command_line
from sft.config.rules import check_settings, warnings_for
from sft.config.schema import TrackerName
from sft.config.tracking_rules import TAKES, trackers_of
from sft.errors import Refusal
from sft.tracking import base
from tests.conftest import ROOT, make_settings


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """All packages of trackers can be imported, as empty ones where they are not there."""
    for name in TAKES.keys() - {"wandb"}:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_one_is_chosen_by_its_name_and_a_list_comes_in_its_place():
    assert trackers_of(make_settings().tracking) == ["wandb"]
    assert trackers_of(make_settings("tracking=none").tracking) == []
    assert trackers_of(make_settings("tracking=tensorboard").tracking) == ["tensorboard"]
    several = make_settings("tracking.trackers=[tensorboard,wandb,tensorboard]")
    assert trackers_of(several.tracking) == ["tensorboard", "wandb"]
    assert [tracker.name for tracker in base.make_trackers(several).trackers] == ["tensorboard", "wandb"]


def test_each_tracker_has_a_file_a_preset_and_a_list_of_settings():
    for name in TrackerName:
        if name != TrackerName.none:
            assert make_settings(f"tracking={name.value}").tracking.tracker == name and name.value in TAKES
            assert base._module_of(name.value).make_tracker().name == name.value


def test_a_preflight_names_each_place(installed, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = base.check_tracking(make_settings("tracking.trackers=[wandb,tensorboard]"))
    assert said.startswith("W&B offline (WANDB_MODE=offline)") and said.endswith("; TensorBoard, files in the run folder")


@pytest.mark.parametrize("words, fix", [
    ("tracking.trackers=[wandb,tensorbord]", "'tracking.trackers=[wandb,tensorboard]'"),
    ("tracking.trackers=[none,wandb]", "tracking=none   without tracking.trackers"),
])  # fmt: skip
def test_a_list_that_holds_something_else_is_refused(installed, words, fix):
    (problem,) = check_settings(make_settings(words))
    assert problem.fix == fix


@pytest.mark.parametrize("words, fix", [
    ('tracking.project="问答 faq"', "tracking.project=faq"),
    ("tracking.entity=my.team", "tracking.entity=my-team"),
    (f"tracking.project={'p' * 101}", f"tracking.project={'p' * 100}"),
])  # fmt: skip
def test_a_name_that_swanlab_refuses_is_refused_with_what_can_be_typed(installed, words, fix):
    (problem,) = check_settings(make_settings("tracking=swanlab", words))
    assert problem.fix == fix
    assert check_settings(make_settings("tracking=swanlab", fix, "tracking.project=a+b_c.d-e")) == []


def test_a_list_in_the_place_of_a_preset_is_told_the_setting_that_takes_one():
    with pytest.raises(Refusal) as refused:
        check_command_line(ROOT / "conf", ["tracking=[wandb,tensorboard]"])
    assert [problem.fix for problem in refused.value.problems] == ["tracking.trackers=[wandb,tensorboard]"]


def test_a_package_that_is_missing_is_refused_with_what_brings_it(tmp_path, monkeypatch):
    (tmp_path / "tensorboard").mkdir()  # a folder of its name, as in a working folder, is not the package
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.path_importer_cache", {})
    (problem,) = check_settings(make_settings("tracking.trackers=[wandb,tensorboard]"))
    assert (
        problem.what == "tracking.trackers=[wandb,tensorboard]" and problem.why == "The package tensorboard is not installed."
    )
    assert problem.fix == 'pip install -e ".[tensorboard]"'
    assert check_settings(make_settings("tracking=tensorboard"), hardware=False) == [], "an export needs none"


def fake_package(name: str, monkeypatch) -> MagicMock:
    """A package that takes every call, in place of the tracker's own."""
    package = MagicMock()
    monkeypatch.setitem(sys.modules, name, package)
    if name == "mlflow":
        monkeypatch.setitem(sys.modules, "mlflow.entities", package.entities)
        monkeypatch.setitem(sys.modules, "mlflow.exceptions", SimpleNamespace(MlflowException=RuntimeError))
        package.MlflowClient.return_value.create_run.return_value.data.params = {}
    if name == "swanlab":
        package.Settings.return_value = SimpleNamespace(mode="offline", project=SimpleNamespace(name=None))
        package.init.return_value.dir = "run"
    return package


def lines_of(name: str, package: MagicMock) -> list[tuple[str, float, int]]:
    """(name, value, step) of the metrics that a tracker passed to its package."""
    if name == "mlflow":
        return [(key, value, step) for key, value, _, step in (call.args for call in package.entities.Metric.call_args_list)]
    calls = package.init.return_value.log.call_args_list
    return [(key, value, call.kwargs["step"]) for call in calls for key, value in call.args[0].items()]


@pytest.mark.parametrize("name", ["mlflow", "swanlab", "trackio"])
def test_a_package_is_given_the_same_lines_whichever_it_is_and_its_faults_end_nothing(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    package, settings = fake_package(name, monkeypatch), make_settings(f"tracking={name}", "tracking.project=faq")
    tracker = base.make_trackers(settings)
    facts = tracker.begin(settings, tmp_path, {"name": "n"}, "transformers")
    assert facts["tracker"] == name and facts["mode"] == "offline" and facts["project"] == "faq" and facts["id"]
    tracker.log({"step": 1, "loss": 2.5, "tokens": 40})
    tracker.log({"step": 2, "eval_loss": 2.25})
    tracker.log_samples([{"index": 0, "step": 2, "prompt": "p", "completion": "c", "finish": "eos", "reference": "r"}], [])
    one = {"text": "c", "finish": "ended", "tokens": 1, "rewards": {"number": 1.0}, "reward": 1.0, "advantage": 0.5}
    tracker.log_rollouts([{"step": 3, "row": 1, "prompt": "p", "completions": [one]}])
    tracker.log({"step": 3, "reward": 1.0})
    tracker.finish("finished", {"eval_loss": 2.25}, None)
    assert tracker._failed == set()
    tables = {"mlflow": package.MlflowClient.return_value.log_dict, "trackio": package.Table,
              "swanlab": package.echarts.Table.return_value.add}  # fmt: skip
    assert "[3, 1, 'p', 'c', 'ended', 1.0, 1.0, 0.5]" in str(tables[name].call_args)
    wanted = {("train/loss", 2.5, 1), ("train/global_step", 1, 1), ("train/num_tokens", 40, 1), ("eval/loss", 2.25, 2)}
    assert wanted | {("train/num_tokens", 40, 2)} <= {
        line for line in lines_of(name, package) if isinstance(line[1], int | float)
    }
    package.init.side_effect = package.MlflowClient.side_effect = RuntimeError("the disk is full")
    broken = base.make_trackers(settings)
    broken.begin(settings, tmp_path, {"name": "n"}, "transformers")
    broken.log({"step": 1, "loss": 2.5})
    broken.finish("finished", {}, None)
    assert caplog.text.count(f"tracking={name} could not start (the disk is full)") == 1 and len(caplog.records) == 1


def test_what_no_tracker_of_the_run_takes_is_named():
    words = ("tracking=tensorboard", "tracking.log_adapter=true", "tracking.mode=online")
    (warning,) = warnings_for(make_settings(*words))
    assert warning == "tracking.mode=online and tracking.log_adapter=true is ignored: tensorboard has no use for it."
    assert warnings_for(make_settings(*words, "tracking.trackers=[tensorboard,wandb]")) == []
    assert warnings_for(make_settings("tracking=tensorboard", "tracking.mode=offline")) == []
    (warning,) = warnings_for(make_settings("tracking=tensorboard", "tracking.trackers=[wandb]"))
    assert warning == "tracking=tensorboard is ignored: tracking.trackers=['wandb']."
