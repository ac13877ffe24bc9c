"""Runs that are cut and gone on with: equal to the run that was never cut, and refused where they cannot go on."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.errors import Refusal
from sft.lifecycle import run
from sft.runs import resume
from sft.storage import atomic
from sft.storage.jsonio import jsonable
from sft.training import checkpoint
from tests import forked
from tests.conftest import ROOT, make_settings
from tests.faults.fault_campaign import BASE, compare, write_rows

JOB = (*BASE, "dataset=local", "dataset.path=rows.jsonl")


def train(cwd: Path, *overrides: str) -> subprocess.CompletedProcess:
    return forked.run("train.py", *overrides, cwd=cwd)


def cut(cwd: Path, after: str, number: int, *overrides: str) -> None:
    """Start train.py and send it a signal as soon as the file `after` is there."""
    process = forked.Process("train.py", *overrides, cwd=cwd)
    limit = time.monotonic() + 200
    while time.monotonic() < limit and not (cwd / after).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(100)


@pytest.fixture(autouse=True)
def rows(tmp_path):
    write_rows(tmp_path)


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
    done = train(other, "resume=../cut")  # dataset.path is relative to where the run was started
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


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, monkeypatch, caplog):
    """Every way of damage to the last checkpoint; the run goes on from the one before to the same end."""
    monkeypatch.setattr("sft.report.page.bundled_charts", lambda: "")
    monkeypatch.chdir(tmp_path)
    settings = make_settings(*JOB, "trainer.max_steps=6")
    run(settings, tmp_path / "whole")
    for number, damage in enumerate(("short", "flipped", "missing", "no manifest")):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "run.json").write_text(json.dumps({**record_of(folder), "status": "running"}), encoding="utf-8")
        steps = checkpoint.steps_saved(folder)
        last = checkpoint.place_of(folder, steps[-1])
        weights = last / "adapter_model.safetensors"
        content = weights.read_bytes()
        if damage == "short":
            weights.write_bytes(content[:-1])
        elif damage == "flipped":
            weights.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        elif damage == "missing":
            weights.unlink()
        else:
            (last / atomic.MANIFEST).unlink()
        if number == 1:
            assert run(settings, folder).status == "finished"
            assert compare(tmp_path / "whole", folder) == []
            assert "adapter_model.safetensors is damaged" in caplog.text
            assert record_of(folder)["sessions"][-1]["from"] == f"checkpoint-{steps[-2]}"
        else:
            assert checkpoint.find_last(folder) == checkpoint.place_of(folder, steps[-2])


def test_another_process_at_work_other_data_and_other_settings_are_refused_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.report.page.bundled_charts", lambda: "")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    settings = make_settings(*JOB, "trainer.max_steps=20", "trainer.max_hours=1e-9")
    assert run(settings, folder).status == "stopped"
    before = (folder / "run.json").read_bytes()
    with resume.locked(folder), pytest.raises(Refusal, match="Another process"):
        run(settings, folder)
    with pytest.raises(Refusal, match=r"lora\.r is 16 there and 8 here"):
        run(make_settings(*JOB, "lora.r=8"), folder)
    with open("rows.jsonl", "a", encoding="utf-8") as file:
        file.write('{"instruction": "New", "output": "row"}\n')
    with pytest.raises(Refusal, match="The data is not what it was"):
        run(settings, folder)
    assert (folder / "run.json").read_bytes() == before


def test_a_run_of_an_older_version_is_the_same_run_if_only_settings_are_new(tmp_path):
    """It knows nothing of the younger settings, and its hash was made without them."""
    settings = make_settings(*JOB)
    known = jsonable(settings)
    del known["trainer"]["cuda_graphs"], known["trainer"]["padding_free"]
    record = {"status": "stopped", "config_hash": "older", "settings": known}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert resume.check_folder(tmp_path, settings) == []
    (problem,) = resume.check_folder(tmp_path, make_settings(*JOB, "trainer.cuda_graphs=false"))
    assert "trainer.cuda_graphs is null there and false here" in problem.why


def test_runs_killed_at_random_moments_end_as_if_they_never_were(tmp_path):
    """A part of the fault campaign with a fixed seed; tests/faults/fault_campaign.py has the long form."""
    done = forked.run("tests/faults/fault_campaign.py", "kills=4", "seed=5", "shapes=epochs", cwd=tmp_path)
    assert done.returncode == 0 and "0 lost or different" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_exports_of_a_fault_campaign_end_where_openmp_may_have_several_threads(tmp_path):
    """They are forked from a run that has trained: a fork that waits for a thread that it does not have waits for ever."""
    command = [sys.executable, str(ROOT / "tests" / "faults" / "fault_campaign.py"), "kills=0", "shapes=merged"]
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=threads, timeout=280)
    assert done.returncode == 0 and "0 lost or different" in done.stdout, done.stdout + done.stderr
