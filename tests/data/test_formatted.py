"""`dataset.format`: a function of the user's own makes the rows, and what it cannot take is refused by row and line."""

import json
import shutil

import pytest

from sft.cli.check import check_command_line
from sft.config.destinations import check_destinations, mark, own_code
from sft.config.fingerprint import config_hash
from sft.config.rules import check_settings
from sft.data.prepare import prepare
from sft.errors import Refusal
from sft.lifecycle import run
from sft.model.tokenizer import load_tokenizer
from sft.runs.record import RunRecord, _keep_code
from sft.signals import StopRequest
from sft.storage.jsonio import jsonable
from tests.conftest import ROOT, SMALL, make_settings

CODE = """
MORE = {"a": 1}

def to_messages(row):
    return [{"role": "user", "content": row["frage"]}, {"role": "assistant", "content": row["antwort"]}]

def to_row(row):
    return {"instruction": row["frage"], "output": row["antwort"]}

def needs_more(row):
    return {"instruction": row["frage"], "output": row["mehr"]}

def not_all(row):
    return to_row(row) if row["id"] % 4 else None

def in_place(row):
    row["instruction"], row["output"] = row.pop("frage"), row.pop("antwort")
    return {k: row[k] for k in ("instruction", "output")}

def by_chance(row):
    import random
    return {"instruction": row["frage"], "output": str(random.random())}

def quits(row):
    raise SystemExit(3)

def a_text(row):
    return row["frage"]

def two(row, index):
    return to_row(row)

async def later(row):
    return to_row(row)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    rows = [{"id": i, "frage": f"Was ist {i} + 1?", "antwort": f"Das ist {i + 1}.", "context": "unread"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = [{"instruction": row["frage"], "output": row["antwort"]} for row in rows]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return tmp_path


def settings_for(function: str | None, *words: str):
    named = [f"dataset.format='mine.py:{function}'"] if function else []
    path = "rows.jsonl" if function else "plain.jsonl"
    return make_settings(*SMALL, "dataset=local", f"dataset.path={path}", *named, *words)


def prepared(function: str | None, *words: str):
    settings = settings_for(function, *words)
    assert check_settings(settings) == []
    return prepare(settings, *load_tokenizer(settings.model))


@pytest.mark.parametrize("function", ["to_messages", "to_row", "in_place"])
def test_rows_are_those_that_the_function_returns(place, function):
    own, plain = prepared(function), prepared(None)
    for name in ("input_ids", "labels", "row"):
        assert own.train[name][:] == plain.train[name][:] and own.eval[name][:] == plain.eval[name][:]
    assert own.facts["warnings"] == plain.facts["warnings"] == [] and own.facts["data_hash"] != plain.facts["data_hash"]
    assert own.facts["shape"] == ("messages" if function == "to_messages" else "instruction")


@pytest.mark.parametrize(
    ("function", "why", "fix"),
    [
        ("needs_more", "raised KeyError: 'mehr'", "mine.py, line 11"),
        ("quits", "raised SystemExit", "mine.py, line 25"),
        ("a_text", "returned 'Was ist 0 + 1?', not a list of messages or a row", "mine.py"),
        ("by_chance", "another row the second time", "not by chance"),
        ("two", "It takes (row, index)", "def two(row):"),
        ("later", "It is async", "def later(row):"),
        ("MORE", "MORE is no function", "def MORE(row):"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_anything_else(place, function, why, fix):
    with pytest.raises(Refusal) as caught:
        prepared(function)
    (problem,) = caught.value.problems
    assert why in problem.why and fix in problem.fix and f"dataset.format=mine.py:{function}" in problem.what


def test_rows_that_the_function_cannot_take_are_counted(place):
    with pytest.raises(Refusal) as caught:
        prepared("not_all")
    text = str(caught.value)
    assert "returned None" in text and "dataset.skip_bad_rows=true   leaves 5 of 20 rows out" in text
    facts = prepared("not_all", "dataset.skip_bad_rows=true").facts
    assert facts["rows"]["bad_rows"] == 5 and facts["rows"]["train"] + facts["rows"]["eval"] == 15


def test_an_endless_function_is_ended(place, monkeypatch):
    from sft import limits

    monkeypatch.setattr(limits, "SECONDS", 0.2)
    with (place / "mine.py").open("a") as file:
        file.write("\ndef endless(row):\n    while True:\n        pass\n")
    with pytest.raises(Refusal, match=r"takes more than 0\.2 seconds"):
        prepared("endless")


def test_another_function_or_file_gives_other_data_and_another_run(place):
    before, hash_before = prepared("to_row").facts["data_hash"], config_hash(settings_for("to_row"))
    assert prepared("in_place").facts["data_hash"] != before
    (place / "mine.py").write_text(CODE.replace('row["antwort"]}\n', 'row["antwort"] + "!"}\n'))
    assert prepared("to_row").facts["data_hash"] != before and config_hash(settings_for("to_row")) != hash_before


@pytest.mark.parametrize(
    ("word", "why", "fix"),
    [
        ("dataset.format='mine.py:to_rows'", "no such function", 'dataset.format="mine.py:to_row"'),
        ("dataset.format='mines.py:to_row'", "no such file", 'dataset.format="mine.py:to_row"'),
        ("dataset.format=to_row", "by its file and its name", "rows.py:to_messages"),
    ],
)
def test_a_misspelt_function_is_refused_with_the_likely_one(place, word, why, fix):
    words = ["model=tiny_random", "dataset=local", "dataset.path=rows.jsonl"]
    with pytest.raises(Refusal) as caught:
        check_command_line(ROOT / "conf", [*words, word], hardware=False)
    (problem,) = caught.value.problems
    assert why in problem.why and fix in problem.fix


def test_a_folder_from_elsewhere_does_not_run_its_function_unasked(place):
    settings = settings_for("to_row")
    assert own_code(settings) == {"dataset.format": '"mine.py:to_row"'}
    (problem,) = check_destinations(settings, {"destinations_mark": "0" * 64}, [], "resume=outputs/r")
    assert "Python code run that is in mine.py" in problem.why and "dataset.format" in problem.fix
    assert check_destinations(settings, {}, ['dataset.format="mine.py:to_row"'], "resume=outputs/r") == []
    assert check_destinations(settings, {"destinations_mark": mark(settings)}, [], "resume=outputs/r") == []


def test_a_copy_of_the_code_that_was_cut_is_made_again(place, monkeypatch):
    settings = settings_for("to_row")
    record = RunRecord(place, settings=jsonable(settings))

    def cut(source, target):
        target.write_text(CODE[:10])
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(shutil, "copy", cut)
        _keep_code(record, settings)
    assert not (place / "code" / "mine.py").exists()
    _keep_code(record, settings)
    assert [file.name for file in (place / "code").iterdir()] == ["mine.py"] and (place / "code/mine.py").read_text() == CODE


def test_a_run_keeps_the_code_and_goes_on_with_the_same_alone(place, monkeypatch):
    words = ("trainer=debug", "trainer.max_steps=2", "trainer.save_steps=1", "samples.num_held_out=0")
    settings, agree = settings_for("to_row", *words), StopRequest.agree

    def stop(self):
        self.signal = "SIGTERM"
        return agree(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agree", stop)
        assert run(settings, place / "run").status == "stopped"
    assert (place / "run" / "code" / "mine.py").read_text() == CODE
    (place / "mine.py").write_text(CODE + "\n# another file\n")
    with pytest.raises(Refusal):
        run(settings, place / "run")
    shutil.copy(place / "run" / "code" / "mine.py", place / "mine.py")
    assert run(settings, place / "run").status == "finished"
