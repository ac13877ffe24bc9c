"""A run folder, a sweep folder and the current folder are data: no code of theirs is run, and nothing in them is obeyed."""

import json
from pathlib import Path

import pytest

from sft import run
from sft.command_line import check_command_line
from sft.resume import recorded_run, working_folder
from sft.runs import settings_of
from sft.runtime import RunRecord, StopRequest, config_hash, jsonable
from tests.conftest import ROOT, make_settings

CONF = ROOT / "conf"

EVIL = "import pathlib\npathlib.Path(__file__).with_name('code_was_run').touch()\nraise ImportError('a stranger')\n"


@pytest.fixture
def folder(tmp_path):
    """A folder that a run could be in."""
    place = tmp_path / "run"
    place.mkdir()
    return place


def test_an_export_runs_no_code_of_the_folder_that_it_is_started_in(folder, monkeypatch, capfd, small):
    for name in ("sft/__init__.py", "queue.py", "tokenize.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(EVIL)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", ":.")
    record = RunRecord(folder, settings=jsonable(small()))
    failed, _ = run._export(folder, record, StopRequest())
    assert failed == ["the export ended early, with exit code 1"]
    assert "the run folder is not whole" in capfd.readouterr().err
    assert not list(folder.rglob("code_was_run"))


def record(folder, settings, **facts) -> None:
    """Write run.json of a run that was stopped."""
    facts = {"status": "stopped", "config_hash": config_hash(settings), "settings": jsonable(settings), **facts}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")


PLAIN = "${oc.env:SFT_TEST_SECRET}", r"\${price}", r"\\${lora.r}", r"C:\new", "${", "a ${b:c} \\", "$\\{x}"


@pytest.mark.parametrize("text", PLAIN)
def test_recorded_settings_are_read_as_they_stand(folder, monkeypatch, small, text):
    monkeypatch.setenv("SFT_TEST_SECRET", "hunter2")
    settings = small()
    settings.dataset.system_prompt = settings.tracking.name = text
    settings.trainer.extra = {"report_to": [text]}
    record(folder, settings)
    for read, _ in (recorded_run(folder), settings_of(folder)):
        assert read == settings and config_hash(read) == config_hash(settings)


def test_a_text_with_a_dollar_and_a_brace_can_be_said(monkeypatch):
    argv = [r'dataset.system_prompt="Costs \${price} a piece"']
    check_command_line(CONF, argv, hardware=False)
    assert make_settings(*argv).dataset.system_prompt == "Costs ${price} a piece"
    monkeypatch.setenv("SFT_TEST_TEXT", "${oc.env:HOME}")
    assert make_settings("dataset.system_prompt=${oc.env:SFT_TEST_TEXT}").dataset.system_prompt == "${oc.env:HOME}"


def test_a_run_goes_on_where_it_was_started(folder, tmp_path):
    with working_folder({"working_folder": str(tmp_path)}, folder):
        assert Path.cwd() == tmp_path


@pytest.mark.parametrize("place", [".", "run", "{folder}", "{folder}/sub", "{folder}/../run/sub", "{folder}/link", 7, ["x"]])
def test_a_working_folder_that_comes_with_the_run_is_not_believed(folder, tmp_path, monkeypatch, caplog, place):
    monkeypatch.chdir(tmp_path)
    (folder / "sub").mkdir()
    (tmp_path / "alias").symlink_to(folder)
    named = {"working_folder": place.format(folder=folder) if isinstance(place, str) else place}
    with working_folder(named, tmp_path / "alias"):
        assert Path.cwd() == tmp_path
    assert "not believed" in caplog.text
