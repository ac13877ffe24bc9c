"""A run folder, a sweep folder and the current folder are data: no code of theirs is run, and nothing in them is obeyed."""

import json
import os
import random
import re
import shutil
import traceback
from pathlib import Path

import pytest

from sft.cli.chat import find_target
from sft.cli.check import check_command_line
from sft.config.fingerprint import config_hash
from sft.config.rules import check_settings
from sft.console import LogFile
from sft.errors import Refusal
from sft.export import child
from sft.export.card import write_card
from sft.export.exporter import _with_earlier, failures
from sft.report import page
from sft.runs import resume
from sft.runs.failures import log_failure
from sft.runs.record import RunRecord
from sft.runs.resume import recorded_run, working_folder
from sft.runs.saved import prompt_form, settings_of
from sft.signals import StopRequest
from sft.storage.jsonio import append_jsonl, jsonable, read_json
from sft.sweep.index import load_index
from sft.sweep.leaderboard import read_leaderboard, write_csv
from sft.sweep.report import write_sweep_report
from sft.training.checkpoint import cut_back
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
    failed, _ = child.export_run_apart(folder, record, StopRequest())
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


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl", "samples.jsonl"])
def test_a_link_in_a_run_folder_is_not_written_through(folder, tmp_path, caplog, name):
    precious = tmp_path / "precious"
    precious.write_text("mine\n")
    writers = {
        "opened": lambda place: LogFile(place, encoding="utf-8").close(),
        "failed": lambda place: log_failure(ValueError("x"), folder),
        "appended": lambda place: append_jsonl(place, {"step": 1}),
        "cut": lambda place: cut_back(folder, {name: 2}),
    }
    for way in ("opened", "failed") if name == "train.log" else ("appended", "cut"):
        caplog.clear()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(precious)
        writers[way](folder / name)
        assert precious.read_text() == "mine\n" and not (folder / name).is_symlink()
        assert f"{name} is a link, which is not followed" in caplog.text


ODD = (None, True, -1, 0, 1.5, 1e308, 10**400, "", "x", "a\0b", "${oc.env:HOME}", "\ud800", "../..", [], [1], ["x"], [[1]],
       [None], {}, {"a": 1}, {"a": {"b": []}}, [{}], [{"name": 1}])  # fmt: skip
FILES = ("run.json", "preflight.json", "export/verify.json", "metrics.jsonl", "samples.jsonl", "rollouts.jsonl",
         "sweep.json")  # fmt: skip
MUTATIONS = 3400 if os.environ.get("SFT_TEST_LONG") else 250
SECONDS_EACH = 0.9
"""Twice what one takes on a core that others use too."""


def whole_folder(settings) -> dict[str, list]:
    """The objects of each file of a run folder, and of a sweep's."""
    numbers = {"loss": 2.0, "eval_loss": 1.5, "eval_loss_start": 3.0, "tokens": 100, "tokens_per_second": 5.0, "kept_step": 4}
    run = {
        "status": "stopped", "reason": "SIGINT", "name": "n", "command": "c", "overrides": ["a=1"], "working_folder": "/",
        "tags": ["t"],
        "config_hash": config_hash(settings), "settings": jsonable(settings), "seconds": {"total": 9.0, "train": 3.0},
        "differs_from_defaults": {"seed": {"default": 1, "value": 2}}, "metrics": numbers,
        "model": {"name": "m", "parameters": 10},
        "data": {"source": "s", "hash": "h", "eval_rows": 4, "held_out_hash": "h"}, "hardware": {"cpu": "c"},
        "versions": {"p": "1"},
        "artifacts": {"adapter": "adapter"}, "sessions": [{"from": None}], "tracking": {"id": "i"}, "error": {"type": "E"},
        "split": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": None},
        "started_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    example = {"text": "ab", "tokens": ["a", "b"], "input_ids": [1, 2], "labels": [-100, 2]}
    preflight = {"shape": "instruction", "stop_tokens": ["<|im_end|>"], "rows": {"train": 4}, "lengths": {"train": {"min": 1}},
                 "warnings": ["w"], "examples": [example], "trained_tokens": 4}  # fmt: skip
    fact = {"status": "failed", "path": "adapter", "loss": 1.0, "size_bytes": 5, "failed": ["loss"],
            "checks": [{"name": "loss", "ok": False, "expected": "1", "found": "2"}]}  # fmt: skip
    verify = {
        "artifacts": {"adapter": fact},
        "reference": {"loss": 1.0, "rows": 4},
        "hub": {"adapter": {"url": "u", "error": "e"}},
    }
    sample = {
        "step": 4,
        "index": 0,
        "source": "config",
        "prompt": "p",
        "completion": "c",
        "completion_ids": [1],
        "finish": "eos",
    }
    job = {"number": 0, "folder": "0_a", "config_hash": run["config_hash"], "overrides": {"seed": "1"}, "settings": {"seed": 1},
           "status": "finished", "attempts": 1, "seconds": 1.0}  # fmt: skip
    jobs = [job, job | {"number": 1, "folder": "1_b", "overrides": {"seed": "2"}}]
    sweep = {"identity": "i", "command": "c", "created_at": "t", "jobs": jobs}
    lines = [{"step": step, "loss": 2.0, "eval_loss": 2.0, "epoch": 0.5} for step in (1, 2)]
    completion = {"text": "c", "finish": "ended", "tokens": 1, "rewards": {"n": 1.0}, "reward": 1.0, "advantage": 0.5}
    rollout = {"step": 1, "row": 1, "prompt": "p", "completions": [completion, completion | {"reward": 0.0}]}
    samples, rollouts = [sample, sample | {"step": 0}], [rollout, rollout | {"step": 2}]
    return dict(zip(FILES, ([run], [preflight], [verify], lines, samples, rollouts, [sweep]), strict=True))


def places_in(value, place=()) -> list[tuple]:
    """Every place in a value where something else can stand."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, inner in items for found in places_in(inner, (*place, key)))]


def changed(value, place: tuple, new):
    if not place:
        return new
    value = value.copy()
    value[place[0]] = changed(value[place[0]], place[1:], new)
    return value


@pytest.mark.parametrize(("place", "new", "key"), [
    (("jobs", 1), None, "jobs[1]"), (("jobs", 0), 10**400, "jobs[0]"), (("jobs",), [None], "jobs[0]"),
    (("jobs", 0, "overrides", "seed"), None, "jobs[0].overrides"),
])  # fmt: skip
def test_a_sweep_with_null_in_place_of_a_job_or_of_a_value_is_refused_by_its_key(folder, small, place, new, key):
    content = changed(whole_folder(small())["sweep.json"][0], place, new)
    (folder / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(Refusal, match=re.escape(key)):
        read_leaderboard(folder)


def test_a_report_leaves_out_null_in_place_of_an_example(folder, small, monkeypatch, caplog):
    monkeypatch.setattr(page, "bundled_charts", lambda: "/* charts */")
    record(folder, small())
    (folder / "preflight.json").write_text('{"examples": [null]}')
    page.write_report(folder)
    assert "ignored, because of an odd form: examples[0]" in caplog.text


def test_half_a_character_in_a_folder_is_read_as_a_question_mark(folder, small):
    content = changed(whole_folder(small())["sweep.json"][0], ("jobs", 1, "folder"), "1_\ud800b")
    (folder / "sweep.json").write_text(json.dumps(content))
    board = read_leaderboard(folder)
    assert [job.folder for job in load_index(folder).jobs] == ["0_a", "1_?b"]
    assert write_csv(board).is_file() and write_sweep_report(board).is_file()


@pytest.mark.timeout(60 + SECONDS_EACH * MUTATIONS)
def test_whatever_stands_in_a_folder_ends_in_a_result_or_in_a_refusal(tmp_path, monkeypatch, small):
    monkeypatch.setattr(page, "bundled_charts", lambda: "/* charts */")
    monkeypatch.chdir(tmp_path)
    settings, rolls, raised = small(), random.Random(7), []
    good = whole_folder(settings)
    for number in range(MUTATIONS):
        name = FILES[rolls.randrange(len(FILES))]
        files, sweep = dict(good), tmp_path / f"outputs/sweeps/{number}"
        place = rolls.choice(places_in(good[name])[1:])
        new = rolls.choice(ODD)
        files[name] = changed(good[name], place, new)
        for folder in (sweep / "0_a", sweep / "1_b"):
            for kept in ("adapter", "export/adapter"):
                (folder / kept).mkdir(parents=True)
            for file, objects in files.items():
                path = sweep / file if file == "sweep.json" else folder / file
                path.write_text("\n".join(map(json.dumps, objects)), encoding="utf-8")
        run = sweep / "0_a"
        actions = [
            lambda run=run: page.write_report(run),
            lambda run=run: check_settings(recorded_run(run)[0], hardware=False),
            lambda run=run: working_folder(resume.read_record(run) or {}, run).__enter__(),
            lambda run=run: resume.read_batch_plan(resume.read_record(run)),
            lambda run=run: resume.check_folder(run, settings),
            lambda run=run: RunRecord(run, resume.read_record(run)).close("stopped"),
            lambda run=run: settings_of(run),
            lambda run=run: find_target(str(run)),
            lambda run=run: prompt_form(run),
            lambda run=run: failures(read_json(run / "export" / "verify.json")),
            lambda run=run: _with_earlier(run, {"artifacts": {}}),
            lambda run=run: write_card(run / "export" / "adapter", run, "adapter"),
            lambda sweep=sweep: write_csv(read_leaderboard(sweep)),
            lambda sweep=sweep: write_sweep_report(read_leaderboard(sweep)),
            lambda sweep=sweep: load_index(sweep) and load_index(sweep).reconcile(),
        ]
        for action in actions:
            try:
                action()
            except Refusal as refusal:
                assert refusal.problems
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                raised.append(f"{name} {place} = {str(new)[:40]!r}: {error!r:.90} ({where.filename}:{where.lineno})")
            finally:
                os.chdir(tmp_path)
        shutil.rmtree(sweep)
    assert not raised, "\n".join(raised)
