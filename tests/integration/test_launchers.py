"""Sweeps whose jobs run in a real Slurm of one node and in a real Ray: spread, taken off, continued, equal to solo runs."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.integration.test_sweep import QUICK, curve, jobs_of, log_of, place  # noqa: F401

LONG = [word for word in QUICK if "steps" not in word]
LONG += ["trainer.max_steps=80", "trainer.eval_steps=40", "trainer.save_steps=1000", "trainer.load_best_model_at_end=false"]


def installed(name: str) -> bool:
    return importlib.util.find_spec(f"hydra_plugins.{name}") is not None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm with two made-up GPUs."""
    if not installed("hydra_submitit_launcher"):
        pytest.skip('needs the extra: pip install -e ".[slurm]"')
    missing = [program for program in ("munged", "slurmctld", "slurmd") if not shutil.which(program)]
    if missing or os.getuid():
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install slurm-wlm munge" if missing else "slurmd needs root")
    folder, script = tmp_path_factory.mktemp("slurm"), str(ROOT / "scripts" / "one_node_slurm.sh")
    subprocess.run([script, "start", str(folder)], check=True, timeout=120)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"
    del os.environ["SLURM_CONF"]
    subprocess.run([script, "stop", str(folder)], check=True, timeout=60)


@pytest.fixture
def ray(monkeypatch):
    """Ray with two made-up GPUs."""
    if not installed("hydra_ray_launcher"):
        pytest.skip('needs the extra: pip install -e ".[ray]"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return "hydra/launcher=ray", "+hydra.launcher.ray.init.num_gpus=2", "+hydra.launcher.ray.init.num_cpus=2"


def start(place, *overrides: str) -> subprocess.Popen:  # noqa: F811
    """train.py as from a shell, with the plant on Python's path: Ray and Slurm start processes of their own from it."""
    environment = {**os.environ, "PYTHONPATH": str(place / "plant")}
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    with open(place / "log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log)


def sweep(place, *overrides: str) -> int:  # noqa: F811
    return start(place, *overrides).wait(timeout=280)


def run_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def wait_for(condition, process, place, seconds=280):  # noqa: F811
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit and process.poll() is None, log_of(place)[-3000:]
        time.sleep(0.2)


def steps_of(folder) -> int:
    try:
        return (folder / "metrics.jsonl").read_text(encoding="utf-8").count('"loss"')
    except FileNotFoundError:
        return 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_four_jobs_are_spread_over_two_gpus(place, request, launcher):  # noqa: F811
    """Each has one GPU, its folder and its row; the same command again has nothing to do."""
    command = ("-m", *QUICK, *request.getfixturevalue(launcher), "lora.r=2,4,8,16")
    assert sweep(place, *command) == 0, log_of(place)[-3000:]
    (folder,) = place.glob("outputs/sweeps/*")
    jobs = jobs_of(folder)
    assert [(job["folder"], job["status"], job["attempts"]) for job in jobs] == [
        (f"{n}_r={r}", "finished", 1) for n, r in enumerate((2, 4, 8, 16))
    ]
    runs = [run_of(folder / job["folder"]) for job in jobs]
    assert {run["place"]["CUDA_VISIBLE_DEVICES"] for run in runs} == {"0", "1"}
    assert [run["config_hash"] for run in runs] == [job["config_hash"] for job in jobs]
    assert all((folder / job["folder"] / ".hydra" / "config.yaml").is_file() for job in jobs)
    assert len((folder / "leaderboard.csv").read_text(encoding="utf-8").splitlines()) == 5
    spans = sorted((run["started_at"], run["ended_at"]) for run in runs)
    assert spans[1][0] < spans[0][1], "two at a time"
    assert sweep(place, *command) == 0
    assert "4 jobs, 4 done before, 0 to run" in log_of(place) and jobs_of(folder) == jobs
    assert sweep(place, *QUICK, "lora.r=8", "hydra.run.dir=solo") == 0
    assert curve(place / "solo") == curve(folder / "2_r=8"), "what a job learns does not depend on where it runs"


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_slurm_jobs_go_on_whatever_happens_to_them(place, slurm):  # noqa: F811
    """The command is killed and repeated, one job is taken off its node, one is told that its time is over."""
    command = ("-m", *LONG, *slurm, "lora.r=2,4", "hydra.sweep.dir=s")
    folders = [place / "s" / "0_r=2", place / "s" / "1_r=4"]
    process = start(place, *command)
    wait_for(lambda: all(steps_of(folder) for folder in folders), process, place)
    process.kill()
    process.wait()
    first = [run_of(folder)["place"]["SLURM_JOB_ID"] for folder in folders]
    ids = [job["place"] for job in jobs_of(place / "s")]
    process = start(place, *command)
    subprocess.run(["scontrol", "requeue", ids[0]], check=True)
    subprocess.run(["scancel", "--signal=USR2", ids[1]], check=True)
    assert process.wait(timeout=900) == 0, log_of(place)[-3000:]
    assert [(job["status"], job["attempts"], job["place"]) for job in jobs_of(place / "s")] == [("finished", 1, None)] * 2
    for number, folder in enumerate(folders):
        run = run_of(folder)
        sessions = [session["from"] for session in run["sessions"]]
        assert len(sessions) == 2 and sessions[1].startswith("checkpoint-"), "continued, not begun anew"
        assert run["place"]["SLURM_JOB_ID"] == first[number], "and still the same job of the queue"
        assert sweep(place, *LONG, f"lora.r={(2, 4)[number]}", f"hydra.run.dir=solo{number}") == 0
        assert curve(place / f"solo{number}") == curve(folder)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_cancelled_slurm_job_is_a_row_and_goes_on_when_the_command_is_repeated(place, slurm):  # noqa: F811
    command = ("-m", *LONG, *slurm, "lora.r=2,4", "hydra.sweep.dir=s")
    process = start(place, *command)
    wait_for(lambda: steps_of(place / "s" / "0_r=2"), process, place)
    subprocess.run(["scancel", jobs_of(place / "s")[0]["place"]], check=True)
    assert process.wait(timeout=600) == 130, log_of(place)[-3000:]
    assert [job["status"] for job in jobs_of(place / "s")] == ["stopped", "finished"]
    assert sweep(place, *command) == 0, log_of(place)[-3000:]
    assert [(job["status"], job["attempts"]) for job in jobs_of(place / "s")] == [("finished", 2), ("finished", 1)]
    assert run_of(place / "s" / "0_r=2")["sessions"][1]["from"].startswith("checkpoint-")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_jobs_save_at_ctrl_c_and_go_on_when_the_command_is_repeated(place, request, launcher):  # noqa: F811
    command = ("-m", *LONG, *request.getfixturevalue(launcher), "lora.r=2,4", "hydra.sweep.dir=s")
    folders = [place / "s" / "0_r=2", place / "s" / "1_r=4"]
    process = start(place, *command)
    wait_for(lambda: all(steps_of(folder) > 6 for folder in folders), process, place)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 130, log_of(place)[-3000:]
    assert [job["status"] for job in jobs_of(place / "s")] == ["stopped", "stopped"]
    assert sweep(place, *command) == 0, log_of(place)[-3000:]
    assert [(job["status"], job["attempts"]) for job in jobs_of(place / "s")] == [("finished", 2), ("finished", 2)]
    for number, folder in enumerate(folders):
        assert run_of(folder)["sessions"][1]["from"].startswith("checkpoint-")
        assert sweep(place, *LONG, f"lora.r={(2, 4)[number]}", f"hydra.run.dir=solo{number}") == 0
        assert curve(place / f"solo{number}") == curve(folder)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_ray_job_whose_process_is_killed_is_started_again(place, ray):  # noqa: F811
    """The first time a job with 3 rows a step kills its process: tests/integration/test_sweep.py."""
    command = ("-m", *QUICK, *ray, "trainer.per_device_train_batch_size=3,1", "hydra.sweep.dir=s")
    assert sweep(place, *command) == 0, log_of(place)[-3000:]
    assert (place / "was_killed").exists()
    assert [(job["status"], job["attempts"]) for job in jobs_of(place / "s")] == [("finished", 1), ("finished", 1)]
