"""`from sft import compose, run`: a run of Python is one of the command line."""

import json
import logging
import subprocess
import sys

import pytest

import sft
from sft.errors import Refusal as Raised
from tests import forked
from tests.conftest import SMALL

WORDS = (*SMALL, "trainer=debug", "trainer.max_steps=2", "samples.num_held_out=0")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_of_python_is_that_of_the_command_line(place):
    made = sft.run(sft.compose(*WORDS), "own")
    assert (made.status, made.exit_code, made.folder.name) == ("finished", 0, "own") and made.metric > 0
    assert "Done   finished" in (place / "own" / "train.log").read_text() and not logging.getLogger("sft").handlers
    assert forked.run("train.py", *WORDS, "hydra.run.dir=typed", cwd=place).returncode == 0
    one, other = (json.loads((place / name / "run.json").read_text()) for name in ("own", "typed"))
    assert one["config_hash"] == other["config_hash"] and one["settings"] == other["settings"]
    assert one["metrics"]["eval_loss"] == other["metrics"]["eval_loss"]
    assert (place / "own" / "report.html").is_file()


def test_words_and_settings_that_cannot_work_raise_every_problem(place):
    with pytest.raises(sft.Refusal) as caught:
        sft.compose("lora.rr=8", "trainer.learning_rate=x")
    assert len(caught.value.problems) == 2 and sft.Refusal is Raised
    settings = sft.compose(*WORDS)
    settings.lora.r = -1
    with pytest.raises(sft.Refusal, match=r"lora\.r"):
        sft.run(settings, "run")
    assert list(place.iterdir()) == []


def test_a_refusal_of_the_data_leaves_no_folder(place):
    (place / "bad.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    with pytest.raises(sft.Refusal):
        sft.run(sft.compose(*WORDS, "dataset=local", "dataset.path=bad.jsonl"), "run")
    assert [path.name for path in place.iterdir()] == ["bad.jsonl"]


def test_a_check_leaves_no_folder_and_an_unnamed_run_gets_one(place):
    assert sft.run(sft.compose(*WORDS, "preflight.mode=only")).status == "checked"
    assert not (place / "outputs").exists()
    (place / "there").mkdir()
    with pytest.raises(sft.Refusal, match="leaves no folder"):
        sft.run(sft.compose(*WORDS, "preflight.mode=only"), "there")
    made = sft.run(sft.compose(*WORDS))
    assert made.folder.parent.name == "outputs" and made.folder.name.endswith("tiny_random_twists")


def test_the_package_loads_nothing_until_it_is_used():
    code = "import sys, sft; assert not {'torch', 'hydra', 'sft.cli.api'} & {*sys.modules}; "
    code += "sft.compose; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
