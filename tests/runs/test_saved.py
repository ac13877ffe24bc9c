"""A finished run finds the model that it was trained on, from wherever it is used."""

import json
import shutil

import pytest

from sft.cli import export
from sft.cli.chat import Speaker, find_target
from sft.errors import Refusal
from sft.lifecycle import run
from sft.model import builtin, hub
from sft.runs.saved import check_base, settings_of
from tests.conftest import SMALL, make_settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the run, the folder it was started in) of a run with `model.name=my-model`, a folder beside it."""
    place = tmp_path_factory.mktemp("project")
    shutil.copytree(builtin.local_model(builtin.TINY_RANDOM), place / "my-model")
    quick = ("trainer=debug", "trainer.max_steps=2", "samples.num_held_out=1", "model.name=my-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run(make_settings(*SMALL, *quick), place / "run").exit_code == 0
    return place / "run", place


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_hub_has", lambda model: pytest.fail(f"the hub was asked for {model.name}"))


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of the run whose model is somewhere else: (run, model)."""
    run_folder, place = trained
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(place / "my-model", tmp_path / "kept")
    record = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    gone = str(tmp_path / "gone")
    record["model"]["source"], record["working_folder"] = f"local folder {gone}/my-model", gone
    (tmp_path / "run/run.json").write_text(json.dumps(record), encoding="utf-8")
    return tmp_path / "run", tmp_path / "kept"


def test_an_export_and_a_chat_elsewhere_find_a_relative_model_where_the_run_had_it(trained):
    folder, place = trained
    assert export.main([f"run={folder}", "export=merged_16bit"]) == 0
    speaker = Speaker(find_target(f"base:{folder}"))
    assert speaker.settings.model.name == str(place / "my-model") and speaker.model is not None
    adapter = json.loads((folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == str(place / "my-model"), "PEFT too finds it from anywhere"


def test_a_model_folder_that_is_gone_is_told_with_a_fix_that_is_taken(moved, capsys, tmp_path):
    folder, kept = moved
    for target in (str(folder), f"base:{folder}"):
        with pytest.raises(Refusal, match=f"The folder my-model was relative to {tmp_path}/gone") as refused:
            find_target(target)
        assert refused.value.problems[0].fix.startswith("model.name=")
    assert export.main([f"run={folder}", "export=merged_16bit"]) == 2
    assert f"The folder my-model was relative to {tmp_path}/gone" in capsys.readouterr().err
    assert export.main([f"run={folder}", "export=merged_16bit", f"model.name={kept}"]) == 0
    assert Speaker(find_target(str(folder), base=str(kept))).model is not None
    assert find_target(str(folder / "export/merged_16bit")).kind == "merged", "which needs no base"


def test_a_project_that_was_moved_as_a_whole_finds_its_model_in_the_folder_it_is_used_in(moved, tmp_path):
    (tmp_path / "kept").rename(tmp_path / "my-model")
    settings, _ = settings_of(moved[0])
    assert settings.model.name == str(tmp_path / "my-model") and check_base(moved[0], settings) == []


def test_a_model_from_the_hub_is_no_folder(moved):
    record = json.loads((moved[0] / "run.json").read_text(encoding="utf-8"))
    record["model"]["source"], record["settings"]["model"]["name"] = "hub owner/name", "owner/name"
    (moved[0] / "run.json").write_text(json.dumps(record), encoding="utf-8")
    settings, _ = settings_of(moved[0])
    assert settings.model.name == "owner/name" and check_base(moved[0], settings) == []
