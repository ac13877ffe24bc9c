"""scripts/chat.py as people use it: the same answers as in samples.jsonl, in a pipe and in a terminal."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.cli.chat import _Writer, find_target
from sft.errors import Refusal
from sft.lifecycle import run
from sft.sanitize import shown
from tests import forked
from tests.conftest import ROOT, SMALL, make_settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory, all_tokens):
    folder = tmp_path_factory.mktemp("chat") / "run"
    made = ["export=gguf", "export.gguf.quantizations=[f16]", "export.num_prompts=2"]
    # Trained to say other things than a line break, and to stop.
    settings = make_settings(*SMALL, *made, "lora=none", "trainer.max_steps=15", "trainer.learning_rate=1e-2",
                             "trainer.eval_steps=15", "trainer.save_steps=15", "dataset.max_rows=12",
                             "trainer.gradient_accumulation_steps=1")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forked.popen)
        assert run(settings, folder).status == "finished"
    return folder


def chat(*options: str, text: str = "") -> subprocess.CompletedProcess:
    return forked.run("scripts/chat.py", *options, cwd=ROOT, text=text)


def last_sample(folder: Path) -> dict:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()][-1]


def plain(completion: str) -> str:
    return completion.removesuffix("<|im_end|>")


@pytest.mark.parametrize("where", ["run", "gguf"])
def test_an_answer_is_that_of_samples_jsonl(trained, where):
    place = trained
    if where == "gguf":
        place = trained / "export" / "gguf" / "model-f16.gguf"
    sample = last_sample(trained)
    done = chat(f"run={place}", f"prompt={sample['question']}", "max_new_tokens=8")
    assert done.returncode == 0 and done.stdout == plain(sample["completion"]) + "\n", done.stderr[-2000:]
    assert sample["completion"].strip()


def test_a_pipe_of_questions_and_two_models_side_by_side(trained):
    done = chat(f"run={trained}", "against=base", "max_new_tokens=4", text="one?\n/reset\ntwo?\n/quit\n")
    assert done.returncode == 0 and done.stdout.count("tiny_random") == 3, done.stderr[-2000:]


def test_a_terminal_streams_and_ends_with_ctrl_d(trained):
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts/chat.py"), f"run={trained}", "max_new_tokens=4"],
                               stdin=child, stdout=child, stderr=child)  # fmt: skip
    os.close(child)
    seen, sent, limit = b"", 0, time.monotonic() + 120
    while time.monotonic() < limit:
        try:
            seen += os.read(parent, 4096)
        except OSError:
            break
        if seen.count(b"\n> ") > sent:
            os.write(parent, b"why?\n" if sent == 0 else b"\x04")
            sent += 1
    assert process.wait(timeout=30) == 0 and sent == 2 and b"Talking to" in seen, seen
    os.close(parent)


def test_what_a_model_says_cannot_reach_the_terminal_as_a_command():
    assert shown("a\x1b[2Jb\r\x07\n\tc \u202e") == "a\\x1b[2Jb\\r\\x07\n\tc \\u202e"


def test_a_character_of_several_tokens_is_said_when_it_is_whole(trained):
    from transformers import AutoTokenizer

    tokenizer, said = AutoTokenizer.from_pretrained(trained / "model"), []
    writer = _Writer(tokenizer, [2], said.append)
    ids = tokenizer("天空 🦥 ok", add_special_tokens=False)["input_ids"]
    for i in [*ids, 2]:
        writer.add([i])
    assert writer.end() == "天空 🦥 ok" == "".join(said) and len(ids) > len([s for s in said if s])
    assert not any("\ufffd" in s for s in said)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("run=nowhere",), "There is no such folder"),
        (("rnu=x",), "run=x"),
        ((f"run={ROOT / 'README.md'}",), "There is no such folder"),
        (("run=x", "temperature=warm"), "temperature=0"),
    ],
)
def test_mistakes_are_refused_at_once(options, told):
    done = chat(*options)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_a_run_in_which_nothing_was_trained_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed", "settings": {"seed": 1}}), encoding="utf-8")
    with pytest.raises(Refusal, match="Nothing was trained"):
        find_target(str(tmp_path))
