"""Sweeps as people run them: killed, repeated, extended, started twice, and equal to the same jobs run alone."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import ROOT

QUICK = ("trainer=debug", "model=tiny_random", "dataset.max_rows=24", "samples.num_held_out=0", "tracking=none",
         "trainer.max_steps=2", "trainer.eval_steps=2", "trainer.save_steps=2")  # fmt: skip
# Runs before train.py: a batch of 5 rows is out of memory, and one of 3 rows kills its process, the first time.
PLANT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from sft.training.nonfinite import NonFiniteSteps

add = NonFiniteSteps.add

def planted(self, loss, inputs):
    import torch
    rows = self.trainer.args.per_device_train_batch_size
    if rows == 5:
        raise torch.OutOfMemoryError("planted: 5 rows do not fit")
    if rows == 3 and not Path("was_killed").exists():
        Path("was_killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return add(self, loss, inputs)

NonFiniteSteps.add = planted
"""
STARTED = "import subprocess\nfrom tests import forked\nsubprocess.Popen = forked.started\n"
"""Before the plant: the jobs in processes of their own are started as always, not forked."""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(PLANT, encoding="utf-8")
    return tmp_path


def start(place: Path, *overrides: str, first: str = "") -> forked.Process:
    """train.py, forked; the processes that it starts itself find the plant on Python's path."""
    environment, plant = {**os.environ, "PYTHONPATH": str(place / "plant")}, place / "plant" / "before.py"
    plant.write_text(first + PLANT, encoding="utf-8")
    (place / "log").touch()
    files = (os.devnull, place / "log", place / "log")
    return forked.Process("train.py", *overrides, cwd=place, env=environment, before=plant, files=files)


def sweep(place: Path, *overrides: str, first: str = "") -> int:
    return start(place, *overrides, first=first).wait(timeout=280)


def log_of(place: Path) -> str:
    return (place / "log").read_text(encoding="utf-8")


def jobs_of(folder: Path) -> list[dict]:
    try:
        return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["jobs"]
    except FileNotFoundError:
        return []


def curve(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the memory say."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gib")} for line in lines]


def kill_after(process: forked.Process, folder: Path, done: int) -> None:
    limit = time.monotonic() + 250
    while time.monotonic() < limit and process.poll() is None:
        if sum(job["status"] not in ("waiting", "running") for job in jobs_of(folder)) >= done:
            process.kill()
        time.sleep(0.05)
    assert process.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_twelve_jobs_survive_everything(place):
    """One job diverges, one has no memory, one is killed, and the whole command is killed twice: 12 right rows."""
    rates = ["1e-3", "2e-3", "3e-3", "1e30", "5e-3", "6e-3", "7e-3", "8e-3", "9e-3", "1e-2", "1.1e-2", "1.2e-2"]
    batches = ["1", "5", "1", "1", "2", "3", "1", "1", "2", "1", "1", "2"]
    isolation = os.environ.get("SFT_TEST_ISOLATION", "shared")
    command = ("-m", *QUICK, f"trainer.learning_rate={','.join(rates)}", f"sweep.isolation={isolation}",
               f"trainer.per_device_train_batch_size={','.join(batches)}",
               "sweep.paired=[trainer.learning_rate,trainer.per_device_train_batch_size]")  # fmt: skip
    process = start(place, *command)
    while not (folders := list(place.glob("outputs/sweeps/*/sweep.json"))):
        assert process.poll() is None, log_of(place)[-3000:]
        time.sleep(0.1)
    folder = folders[0].parent
    kill_after(process, folder, 3)
    if isolation == "shared":  # the planted kill takes the command with it; in processes of their own only the job
        assert sweep(place, *command) == -signal.SIGKILL
    kill_after(start(place, *command), folder, 9)
    assert sweep(place, *command) == 1, log_of(place)[-3000:]

    assert [path.parent for path in place.glob("outputs/sweeps/*/sweep.json")] == [folder], "one sweep, found again"
    jobs = jobs_of(folder)
    assert [float(job["overrides"]["trainer.learning_rate"]) for job in jobs] == [float(rate) for rate in rates]
    status = [job["status"] for job in jobs]
    assert status.pop(3) == "diverged" and status.pop(1) == "failed" and set(status) == {"finished"} and len(status) == 10
    assert "planted: 5 rows do not fit" in jobs[1]["reason"] and "not a" in jobs[3]["reason"]
    attempts = [job["attempts"] for job in jobs if job["status"] == "finished"]
    assert attempts.count(1) >= 7 and max(attempts) <= 2, "only the jobs that were cut ran again"
    assert "OutOfMemoryError" in log_of(place) and "diverged" in log_of(place), "printed when they happen"
    table = (folder / "leaderboard.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 13 and table[0].startswith("rank,trainer.learning_rate,trainer.per_device_train_batch_size,status")

    solo = {"shared": [5, 11], "process": range(12)}[isolation]
    for number in [n for n in solo if jobs[n]["status"] == "finished"]:
        overrides = [f"{key}={value}" for key, value in jobs[number]["overrides"].items()]
        assert sweep(place, *overrides, f"hydra.run.dir=solo{number}") == 0, log_of(place)[-3000:]
        assert curve(place / f"solo{number}") == curve(folder / jobs[number]["folder"])


@pytest.mark.slow
def test_a_killed_job_in_a_process_of_its_own_is_only_a_row(place):
    """Here the sweep is to stop at a failure; repeated, it does the killed job again and goes on."""
    command = ("-m", *QUICK, "trainer.per_device_train_batch_size=3,1", "hydra.sweep.dir=s")
    assert sweep(place, *command, "sweep.isolation=process", "sweep.on_failure=stop", first=STARTED) == 1
    killed, waiting = jobs_of(place / "s")
    assert killed["status"] == "failed" and killed["reason"].startswith("killed by SIGKILL") and waiting["status"] == "waiting"
    run = json.loads((place / "s" / killed["folder"] / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "failed" and run["reason"] == killed["reason"] and "Failed: killed by SIGKILL" in log_of(place)
    assert sweep(place, *command) == 0, log_of(place)[-3000:]
    assert [(job["status"], job["attempts"]) for job in jobs_of(place / "s")] == [("finished", 2), ("finished", 1)]


@pytest.mark.slow
def test_a_grid_that_grows_runs_only_its_new_jobs(place):
    assert sweep(place, "-m", *QUICK, "lora.r=4,8") == 0
    (folder,) = place.glob("outputs/sweeps/*")
    before = {job["folder"]: (folder / job["folder"] / "run.json").read_bytes() for job in jobs_of(folder)}
    assert sweep(place, "-m", *QUICK, "lora.r=2,4,8") == 0
    assert list(place.glob("outputs/sweeps/*")) == [folder]
    assert [(job["folder"], job["attempts"]) for job in jobs_of(folder)] == [("0_r=4", 1), ("1_r=8", 1), ("2_r=2", 1)]
    assert all((folder / name / "run.json").read_bytes() == content for name, content in before.items())
    assert "3 jobs, 2 done before, 1 to run" in log_of(place)


@pytest.mark.long
def test_wandb_has_a_run_for_each_job_and_one_for_the_table(place):
    """None of them merged, all in the sweep's group. On a busy machine W&B may not start in time, and runs go on without it."""
    assert sweep(place, "-m", *QUICK, "lora.r=4,8", "tracking=wandb") == 0
    (folder,) = place.glob("outputs/sweeps/*")
    for name in [*(job["folder"] for job in jobs_of(folder)), "."]:
        (binary,) = (folder / name).glob("wandb/offline-run-*/*.wandb")
        assert folder.name.encode() in binary.read_bytes(), "the group"
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/*.json")
    assert [row[0] for row in json.loads(table.read_text(encoding="utf-8"))["data"]] == [1, 2]


@pytest.mark.slow
def test_two_sweeps_started_together_do_not_meet(place):
    command = ("-m", *QUICK, "lora.r=4")
    both = [start(place, *command), start(place, *command)]
    assert [process.wait(timeout=280) for process in both] == [0, 0], log_of(place)[-3000:]
    folders = list(place.glob("outputs/sweeps/*"))
    assert len(folders) == 2
    for folder in folders:
        assert [(job["status"], job["attempts"]) for job in jobs_of(folder)] == [("finished", 1)]
    assert curve(folders[0] / "0_job") == curve(folders[1] / "0_job"), "and neither wrote into the other's files"


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["shared", "process"])
def test_ctrl_c_ends_the_sweep_and_it_can_be_repeated(place, isolation):
    steps = [word for word in QUICK if not word.startswith("trainer.")]
    long = ("trainer.max_steps=50", "trainer.eval_steps=25", "trainer.save_steps=25",
            "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1")  # fmt: skip
    command = ("-m", *steps, *long, "lora.r=4,8", f"sweep.isolation={isolation}", "hydra.sweep.dir=s")
    process, metrics = start(place, *command), place / "s" / "0_r=4" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (metrics.is_file() and metrics.read_text().count('"loss"') > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, log_of(place)[-3000:]
    assert [job["status"] for job in jobs_of(place / "s")] == ["stopped", "waiting"]
    assert jobs_of(place / "s")[0]["reason"].startswith("SIGINT at step") and (place / "s" / "leaderboard.csv").is_file()
    assert sweep(place, *command) == 0, log_of(place)[-3000:]
    assert [(job["status"], job["attempts"]) for job in jobs_of(place / "s")] == [("finished", 2), ("finished", 1)]
    sessions = json.loads((place / "s" / "0_r=4" / "run.json").read_text(encoding="utf-8"))["sessions"]
    assert len(sessions) == 2 and sessions[1]["from"].startswith("checkpoint-"), "it went on from where it stood"
    steps = [line["step"] for line in curve(place / "s" / "0_r=4") if "loss" in line]
    assert steps == list(range(1, 51)), "no step is missing, and none was done twice"
