"""Folders that are complete or absent, and the checkpoints made of them. Nothing heavy."""

import json

import pytest

from sft.errors import SaveFailed
from sft.storage import atomic
from sft.training import checkpoint


def save(folder, step, content="weights"):
    with checkpoint.writing(folder, step, {"step": step}) as work:
        (work / "model").write_text(content)


def test_a_folder_that_fails_half_way_leaves_what_was_there(tmp_path):
    with atomic.new_folder(tmp_path / "place") as work:
        (work / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic.new_folder(tmp_path / "place") as work:
        (work / "file").write_text("new")
        raise RuntimeError
    assert (tmp_path / "place" / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["place"]
    with atomic.new_folder(tmp_path / "place") as work:
        (work / "file").write_text("new")
    assert (tmp_path / "place" / "file").read_text() == "new" and atomic.find_damage(tmp_path / "place") is None


def test_a_folder_made_by_another_process_meanwhile_stays(tmp_path):
    with atomic.new_folder(tmp_path / "place", replace=False) as work:
        (work / "file").write_text("mine")
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / "file").write_text("theirs")
    assert (tmp_path / "place" / "file").read_text() == "theirs" and [p.name for p in tmp_path.iterdir()] == ["place"]


def test_a_folder_that_was_moved_aside_when_the_process_died_comes_back(tmp_path):
    save(tmp_path, 2)
    aside = tmp_path / "checkpoints" / f".checkpoint-2-{atomic.ASIDE}-x"
    aside.mkdir()
    (tmp_path / "checkpoints" / "checkpoint-2").rename(aside / "checkpoint-2")
    (tmp_path / "checkpoints" / ".checkpoint-4-half").mkdir()
    assert checkpoint.find_last(tmp_path) == checkpoint.place_of(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_save_that_fails_is_told_in_one_sentence_and_leaves_the_last_one(tmp_path):
    save(tmp_path, 2)
    told = r"checkpoint of step 4 could not be written: .*No space left"
    with pytest.raises(SaveFailed, match=told), checkpoint.writing(tmp_path, 4, {}):
        raise OSError(28, "No space left on device")
    assert checkpoint.steps_saved(tmp_path) == [2] and checkpoint.find_last(tmp_path).name == "checkpoint-2"


def test_the_best_and_the_newest_are_never_pruned(tmp_path):
    for step in (2, 4, 10, 8):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2, best=4)
    assert checkpoint.steps_saved(tmp_path) == [4, 10]
    checkpoint.prune(tmp_path, 1, best=4)
    assert checkpoint.steps_saved(tmp_path) == [4, 10]
    checkpoint.prune(tmp_path, 1, best=None)
    assert checkpoint.steps_saved(tmp_path) == [10]


def test_lines_after_the_checkpoint_are_cut_and_torn_ones_with_them(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n')
    save(tmp_path, 1)
    (tmp_path / "samples.jsonl").write_text("later\n")
    with open(metrics, "a") as file:
        file.write('{"step": 2}\n{"st')
    checkpoint.cut_back(tmp_path, checkpoint.read_state(checkpoint.place_of(tmp_path, 1))["bytes"])
    assert metrics.read_text() == '{"step": 1}\n' and not (tmp_path / "samples.jsonl").exists()


def test_a_manifest_that_is_no_manifest_counts_as_damage(tmp_path):
    save(tmp_path, 2)
    for text in ("", "[]", "{", json.dumps({"model": 3}), json.dumps({"model": {"bytes": "x"}})):
        (checkpoint.place_of(tmp_path, 2) / atomic.MANIFEST).write_text(text)
        assert atomic.find_damage(checkpoint.place_of(tmp_path, 2)) is not None
