"""A run folder from elsewhere cannot say where its reader sends what is made; a run of one's own goes on without a word."""

import json
from pathlib import Path

import pytest

from sft.cli.check import check_command_line
from sft.config import fingerprint
from sft.config.destinations import check_destinations, mark
from sft.config.schema import ExportSettings, HubSettings, Settings, TrackerName, TrackingSettings
from sft.errors import Refusal
from sft.runs.resume import check_folder, recorded_run
from sft.storage import cache as storage_cache
from sft.storage import jsonio
from tests.conftest import ROOT, make_settings
from tests.hints import hints_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))


def sending(repo="me/demo", private=True, entity=None) -> Settings:
    export = ExportSettings(formats=["adapter"], hub=HubSettings(repo=repo, private=private))
    tracker = TrackerName.wandb if entity else TrackerName.none
    return Settings(export=export, tracking=TrackingSettings(tracker=tracker, entity=entity))


def check(settings, record, *typed) -> str:
    return "\n".join(f"{p.why}\n{p.fix}" for p in check_destinations(settings, record, list(typed), "resume=outputs/r"))


def test_a_run_of_ones_own_goes_on_without_a_word():
    settings = sending(entity="team")
    assert check(settings, {"destinations_mark": mark(settings)}) == ""
    assert (storage_cache.cache_dir() / "destinations.key").stat().st_mode & 0o77 == 0


def test_a_run_that_sends_nothing_needs_no_mark():
    assert mark(Settings(tracking=TrackingSettings(tracker=TrackerName.none))) is None and check(sending(repo=None), {}) == ""


@pytest.mark.parametrize("changed", [
    sending(repo="attacker/demo"), sending(private=False), sending(entity="attacker"),
])  # fmt: skip
def test_a_mark_vouches_for_the_destinations_it_was_made_of_alone(changed):
    assert "not begun by you on this machine" in check(changed, {"destinations_mark": mark(sending())})


@pytest.mark.parametrize("known", [None, "", "0" * 64, 7, ["x"], "ü"])
def test_a_folder_from_elsewhere_is_asked_about_and_the_hint_is_the_word(known):
    mark(sending())  # the reader has a key
    settings = sending(private=False, entity="team")
    text = check(settings, {"destinations_mark": known})
    assert "(public)" in text and "resume=outputs/r export.hub.repo=me/demo tracking.entity=team" in text
    assert check(settings, {"destinations_mark": known}, "export.hub.repo=me/demo", "tracking.entity=team") == ""


def test_resume_asks_before_anything_is_sent(small, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    settings = small("export=adapter", "export.hub.repo=attacker/demo")
    record = {"status": "stopped", "settings": jsonio.jsonable(settings), "config_hash": fingerprint.config_hash(settings)}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(Refusal, match=r"sends what it makes to export\.hub\.repo=attacker/demo") as refusal:
        check_command_line(ROOT / "conf", [f"resume={folder}"])
    (hint,) = hints_of(refusal.value.problems[0])
    assert hint == [f"resume={folder}", "export.hub.repo=attacker/demo"]
    check_command_line(ROOT / "conf", hint)
    with pytest.raises(Refusal, match="would be ignored"):
        check_command_line(ROOT / "conf", [f"resume={folder}", "export.hub.repo=me/demo"])


def rewarding(tmp_path, *names: str) -> tuple[Settings, list[str]]:
    file = tmp_path / "rewards.py"
    file.write_text("def polite(completion, row):\n    return 1.0\n")
    named = ",".join(names or ("number", f"'{file}:polite'"))
    return make_settings("method=grpo", f"method.reward_funcs=[{named}]"), [str(file)]


def test_files_of_rewards_that_a_folder_from_elsewhere_names_are_run_at_the_readers_word_alone(tmp_path):
    settings, (file,) = rewarding(tmp_path)
    (problem,) = check_destinations(settings, {"destinations_mark": "0" * 64}, [], "resume=outputs/r")
    assert f"Python code run that is in {file}" in problem.why
    (hint,) = hints_of(problem)
    assert check_destinations(settings, {}, hint[1:], hint[0]) == []
    assert check_destinations(settings, {"destinations_mark": mark(settings)}, [], "resume=outputs/r") == []
    other, _ = rewarding(tmp_path, "ends", f"'{file}:polite'")
    assert check_destinations(other, {"destinations_mark": mark(settings)}, [], "resume=outputs/r") != []


def test_shipped_rewards_need_no_word(tmp_path):
    settings, _ = rewarding(tmp_path, "number", "ends")
    assert mark(settings) is None and check_destinations(settings, {}, [], "resume=outputs/r") == []


def test_resume_asks_before_a_file_of_rewards_is_run(tmp_path):
    settings, _ = rewarding(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    record = {"status": "stopped", "settings": jsonio.jsonable(settings), "config_hash": fingerprint.config_hash(settings)}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(Refusal, match="has Python code run") as refusal:
        check_command_line(ROOT / "conf", [f"resume={folder}"])
    (hint,) = hints_of(refusal.value.problems[0])
    check_command_line(ROOT / "conf", hint)
    with pytest.raises(Refusal, match="would be ignored"):
        check_command_line(ROOT / "conf", [f"resume={folder}", "method.reward_funcs=[ends]"])


def test_a_file_of_rewards_that_has_changed_is_said_where_a_run_goes_on(tmp_path, caplog):
    settings, (file,) = rewarding(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    record = {"status": "stopped", "settings": jsonio.jsonable(settings), "config_hash": fingerprint.config_hash(settings),
              "reward_files": fingerprint.reward_hashes(settings)}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    assert recorded_run(folder)[0] == settings and check_folder(folder, settings, locked=True) == [] and not caplog.messages
    Path(file).write_text("def polite(completion, row):\n    return 0.5\n")
    assert recorded_run(folder)[0] == settings and check_folder(folder, settings, locked=True) == []
    assert [f"The file of the reward {file}:polite has changed" in message for message in caplog.messages] == [True]
