"""Runs that are cut and gone on with: equal to the run that was never cut, and refused where they cannot go on."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.fault_campaign import compare
from tests.conftest import ROOT, SMALL

JOB = (*SMALL, "samples.max_new_tokens=4", "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2",
       "trainer.max_steps=6", "trainer.eval_steps=2", "trainer.save_steps=2", "lora.lora_dropout=0.2",
       "samples.every_steps=3")  # fmt: skip


def train(cwd: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=280)


def cut(cwd: Path, after: str, number: int, *overrides: str) -> None:
    """Start train.py and send it a signal as soon as the file `after` is there."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *overrides], cwd=cwd, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 200
    while time.monotonic() < limit and not (cwd / after).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(100)


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_killed_run_goes_on_with_resume_alone_and_equals_the_whole_one(tmp_path):
    whole = train(tmp_path, *JOB, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    cut(tmp_path, "cut/checkpoints/checkpoint-2/manifest.json", signal.SIGKILL, *JOB, "hydra.run.dir=cut")
    assert record_of(tmp_path / "cut")["status"] == "running"
    with open(tmp_path / "cut" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')  # a torn last line
    (tmp_path / "cut" / "checkpoints" / ".checkpoint-4-x").mkdir()  # a save that was cut
    other = tmp_path / "elsewhere"
    other.mkdir()
    done = train(other, "resume=../cut")
    assert done.returncode == 0 and "Resume from step 2" in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert compare(tmp_path / "whole", tmp_path / "cut") == []
    record = record_of(tmp_path / "cut")
    assert [session["from"] for session in record["sessions"]] == [None, "checkpoint-2"]
    assert record["overrides"] == list(JOB) and not list(other.iterdir())

    for overrides in (("resume=cut",), (*JOB, "hydra.run.dir=cut")):
        done = train(tmp_path, *overrides)
        assert done.returncode == 2 and "finished" in done.stderr and "Traceback" not in done.stderr


def test_the_same_command_goes_on_after_sigterm(tmp_path):
    job = (*JOB, "trainer.max_steps=200", "hydra.run.dir=run")
    cut(tmp_path, "run/checkpoints/checkpoint-2/manifest.json", signal.SIGTERM, *job)
    record = record_of(tmp_path / "run")
    assert record["status"] == "stopped" and record["reason"].startswith("SIGTERM at step")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    step = int(record["reason"].rsplit(" ", 1)[1])
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "manifest.json").is_file()

    refused = train(tmp_path, *JOB, "trainer.max_steps=201", "hydra.run.dir=run")
    assert refused.returncode == 2 and "trainer.max_steps is 200 there and 201 here" in refused.stderr
    assert record_of(tmp_path / "run") == record

    descriptor = os.open(tmp_path / "run", os.O_RDONLY)  # as a second run would
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    begin = time.monotonic()
    for overrides in (("resume=run",), job):
        refused = train(tmp_path, *overrides)
        assert refused.returncode == 2 and "Another process is training" in refused.stderr, refused.stderr[-3000:]
    assert time.monotonic() - begin < 20 and record_of(tmp_path / "run") == record
    os.close(descriptor)

    cut(tmp_path, f"run/checkpoints/checkpoint-{step + 2 + step % 2}/manifest.json", signal.SIGINT, *job)
    assert record_of(tmp_path / "run")["sessions"][1]["from"] == f"checkpoint-{step}"
