"""A run folder, a sweep folder and the current folder are data: no code of theirs is run, and nothing in them is obeyed."""

import pytest

from sft import run
from sft.runtime import RunRecord, StopRequest, jsonable

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
