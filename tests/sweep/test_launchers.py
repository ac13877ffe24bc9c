"""Launchers and searches without their packages: the presets compose, and what cannot work is refused with the way out."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import hydra_plugins.sft_sweep as plugins
from sft.errors import Problem
from sft.sweep import checks
from sft.sweep import cluster as sweep_cluster
from sft.sweep.index import Job
from sft.sweep.slurm import SlurmJobs
from tests import hints
from tests.conftest import ROOT

CONF = ROOT / "conf"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """`machine(installed=..., sbatch=..., gpu=...)`: a machine that has these."""
    monkeypatch.chdir(tmp_path)

    def has(installed=True, sbatch=True, gpu=True):
        monkeypatch.setattr(checks, "_installed", lambda plugin: installed)
        monkeypatch.setattr(checks.shutil, "which", lambda program: "/usr/bin/sbatch" if sbatch else None)
        monkeypatch.setattr(checks, "gpu_present", lambda: gpu)

    return has


def hydra_of(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True).hydra


def problems_of(*argv) -> list[Problem]:
    """The problems of a command line, of which every hint is typed."""
    problems = hints.problems_of(argv)
    hints.type_hints(argv, problems, hints.problems_of)
    return problems


# ------------------------------------------------------------------------------------------------------ the presets


@pytest.mark.parametrize("name", ["submitit_slurm", "ray"])
def test_a_launcher_composes_without_its_package_and_opens_with_its_command(name):
    launcher = hydra_of(f"hydra/launcher={name}").launcher
    assert issubclass(getattr(plugins, launcher._target_.rpartition(".")[2]), plugins.SweepLauncher)
    first = (CONF / "hydra" / "launcher" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# python train.py -m hydra/launcher={name} ")


def test_a_job_gets_one_gpu():
    assert hydra_of("hydra/launcher=submitit_slurm").launcher.gpus_per_node == 1
    assert hydra_of("hydra/launcher=ray").launcher.ray.remote.num_gpus == 1


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_search_turns_multirun_on_and_has_a_fixed_seed(name):
    hydra = hydra_of(f"sweep={name}")
    assert hydra.mode.name == "MULTIRUN" and hydra.sweeper.sampler.seed is not None
    assert hydra.sweeper._target_ == hydra_of().sweeper._target_, "the sweep is ours, and the search is a part of it"


def test_the_launchers_settings_are_upstreams():
    if not checks._installed("hydra_submitit_launcher"):
        pytest.skip('needs the extra: pip install -e ".[slurm]"')
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    keys = set(hydra_of("hydra/launcher=submitit_slurm").launcher)
    assert keys == set(OmegaConf.structured(SlurmQueueConf))


# ----------------------------------------------------------------------------------------------------- the refusals


@pytest.mark.parametrize(
    ("argv", "extra"),
    [
        (["sweep=tpe"], "optuna"),
        (["sweep=random"], "optuna"),
        (["-m", "hydra/launcher=submitit_slurm", "lora.r=8,16"], "slurm"),
        (["sweep=lr", "hydra/launcher=ray"], "ray"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(machine, argv, extra):
    machine(installed=False)
    (problem,) = problems_of(*argv)
    assert problem.fix.startswith(f'pip install -e ".[{extra}]"') and "not installed" in problem.why


def test_what_is_there_is_not_refused(machine):
    machine()
    for argv in (["sweep=tpe"], ["sweep=random", "hydra/launcher=ray"], ["-m", "hydra/launcher=submitit_slurm", "seed=1,2"]):
        assert problems_of(*argv) == []
    assert problems_of("sweep=tpe", "trainer.learning_rate=tag(log,interval(1e-5,1e-3))", "lora.r=int(interval(4,64))") == []


def test_all_that_is_wrong_is_said_at_once(machine):
    machine(installed=False, sbatch=False)
    problems = problems_of("-m", "hydra/launcher=submitit_slurm", "lora.r=8,16", "lora.rr=3")
    assert [word for problem in problems for word in ("lora.rr", "not installed", "sbatch") if word in problem.why] == [
        "lora.rr",
        "not installed",
        "sbatch",
    ]


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (["-m", "trainer.learning_rate=interval(1e-4,1e-3)"], "sweep=tpe"),
        (["sweep=tpe", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=10"),
        (["sweep=tpe", "dataset.eval_fraction=0"], "dataset.eval_fraction=0.1"),
        (["sweep=tpe", "trainer.learning_rate=interval(-1,1e-3)"], "trainer.learning_rate"),
        (["sweep=tpe", "lora.r=interval(4,64)"], "lora.r=int(interval(4,64))"),
        (["hydra/launcher=ray"], "python train.py -m hydra/launcher=ray"),
        (["-m", "hydra/launcher=basic", "lora.r=4,8"], "hydra/launcher=ray "),
        (["sweep=tpe", "sweep.paired=[lora.r]"], "sweep.paired=[]"),
        (["sweep=tpe", "method=sft,dpo"], "method=sft"),
        (["sweep=random", "method=choice(grpo,dpo)"], "method=grpo"),
    ],
)
def test_what_cannot_work_is_refused(machine, argv, fix):
    machine()
    (problem,) = problems_of(*argv)
    assert fix in problem.fix


def test_a_gpu_is_asked_for_where_the_jobs_run(machine):
    machine(gpu=False)
    (problem,) = problems_of("-m", "hydra/launcher=ray", "lora.r=8,16")
    assert problem.fix == "hydra.launcher.ray.remote.num_gpus=0"
    four_bit = ("-m", "model.load_in_4bit=true", "lora.r=8,16")
    assert any("4bit" in problem.what for problem in problems_of(*four_bit))
    assert problems_of(*four_bit, "hydra/launcher=submitit_slurm") == [], "a login node needs none"
    assert problems_of(*four_bit, "hydra/launcher=ray", "hydra.launcher.ray.init.address=auto") == []


# ------------------------------------------------------------------------------------------------ jobs and their ends


class Cluster:
    """A cluster whose jobs are over when the test says so."""

    name = "job"

    def __init__(self):
        self.started, self.queue, self.stopped = [], set(), set()

    def start(self, jobs, overrides):
        self.started += overrides
        places = [f"p{job.number}" for job in jobs]
        self.queue |= set(places)
        return places

    def alive(self, places):
        return self.queue & set(places)

    def stop(self, places):
        self.stopped |= set(places)
        self.queue -= set(places)

    def explain(self, place):
        return "failed", f"{place} vanished"


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.setattr(sweep_cluster, "POLL", 0.0)
    monkeypatch.setattr(sweep_cluster, "SETTLE", 0.0)
    return [Job(n, f"{n}_r={n}", f"hash{n}", {}, {}) for n in range(3)]


def test_a_job_goes_to_its_folder_and_one_that_is_still_queued_is_not_sent_again(jobs, tmp_path):
    cluster = Cluster()
    words = {job.number: [f"lora.r={job.number}"] for job in jobs}
    jobs[1].place, cluster.queue = "p9", {"p9"}
    places = sweep_cluster.hand_over(cluster, jobs, words, tmp_path)
    assert places == {"p0": jobs[0], "p9": jobs[1], "p2": jobs[2]} and [job.attempts for job in jobs] == [1, 0, 1]
    assert cluster.started[1] == ["lora.r=2", f"hydra.sweep.dir='{tmp_path}'", "hydra.sweep.subdir='2_r=2'"]


def test_a_job_that_vanishes_is_a_row_with_the_clusters_reason(jobs, tmp_path):
    cluster = Cluster()
    places = sweep_cluster.hand_over(cluster, jobs, {job.number: [] for job in jobs}, tmp_path)
    cluster.queue = set()
    (tmp_path / "1_r=1").mkdir()
    (tmp_path / "1_r=1" / "run.json").write_text('{"status": "finished", "seconds": {"total": 5}}', encoding="utf-8")
    told = []
    sweep_cluster.watch(cluster, places, tmp_path, lambda job: told.append(job.number) or True)
    assert told == [0, 1, 2] and [job.status for job in jobs] == ["failed", "diverged", "failed"]
    assert jobs[0].reason == "p0 vanished" and jobs[1].seconds == 5 and {job.place for job in jobs} == {None}
    assert "p2 vanished" in (tmp_path / "2_r=2" / "run.json").read_text(encoding="utf-8")
    assert [sweep_cluster.exit_code(job) for job in jobs] == [1, 1, 1]


def test_a_failure_and_an_interruption_stop_the_others(jobs, tmp_path):
    cluster = Cluster()
    places = sweep_cluster.hand_over(cluster, jobs, {job.number: [] for job in jobs}, tmp_path)
    cluster.queue.remove("p0")
    sweep_cluster.watch(cluster, places, tmp_path, lambda job: job.number != 0)
    assert cluster.stopped == {"p1", "p2"}

    def interrupt(job):
        raise KeyboardInterrupt

    places = sweep_cluster.hand_over(cluster, jobs, {job.number: [] for job in jobs}, tmp_path)
    cluster.queue.remove("p0")
    cluster.stopped = set()
    with pytest.raises(KeyboardInterrupt):
        sweep_cluster.watch(cluster, places, tmp_path, interrupt)
    assert cluster.stopped >= {"p1", "p2"}


def test_slurm_is_asked_for_ended_jobs_and_believed_only_when_it_answers(monkeypatch):
    class Answer:
        returncode, stdout, stderr = 0, "7_0\n7_2\n12\n", "no route"

    monkeypatch.setattr("subprocess.run", lambda *words, **options: Answer)
    slurm = SlurmJobs.__new__(SlurmJobs)
    assert slurm.alive(["7_0", "7_1"]) == {"7_0"}
    Answer.returncode = 1
    assert slurm.alive(["7_0", "7_1"]) == {"7_0", "7_1"}
    Answer.stdout = "JobId=7 JobState=OUT_OF_MEMORY StdErr=/x/7.err"
    assert slurm.explain("7") == ("failed", "Slurm job 7: OUT_OF_MEMORY; its log: /x/7.err")
    Answer.stdout = "JobId=7 JobState=NODE_FAIL StdErr=/x/7.err"
    assert slurm.explain("7")[0] == "stopped"
