"""Jobs of a sweep in processes that a cluster starts: hand them over, watch them, and write down how each one ended.

The command that runs the sweep keeps its index and table; the jobs write to their run folders alone. So folders have to be
visible under the same path wherever a job runs.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from sft.paths import ROOT
from sft.storage import jsonio
from sft.sweep.index import FINISHED, RUNNING, STOPPED, WAITING, Job, judge, read_run

POLL = 1.0
"""Seconds between two checks of the jobs."""

SETTLE = 15.0
"""Seconds a network file system may take to show what a job wrote last."""

STOP = 120.0
"""Seconds that jobs get to save when the sweep is interrupted."""


class Cluster(Protocol):
    """What has jobs run elsewhere: sft/sweep/slurm.py and sft/sweep/ray_cluster.py."""

    name: str
    """What one of its jobs is called: `Slurm job`."""

    def start(self, jobs: list[Job], overrides: list[list[str]]) -> list[str]:
        """Hand over `jobs`; returns the id of each. Raises Refusal where the cluster will not have them."""

    def alive(self, places: Iterable[str]) -> set[str]:
        """Those of the ids that wait or run."""

    def stop(self, places: Iterable[str]) -> None:
        """Ask for an end, with the state saved."""

    def explain(self, place: str) -> tuple[str, str]:
        """(`failed` or `stopped`, reason) of a job that ended without writing down why."""


def make_task(run: Callable[..., Any], job: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """`run(config)`, which does `job(config)`, as a task elsewhere: in this folder, with what it takes from this command."""
    path = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    os.environ["PYTHONPATH"] = path  # inherited by what the cluster starts, which has to find this package
    group = {"WANDB_RUN_GROUP": os.environ["WANDB_RUN_GROUP"]}
    return functools.partial(run, job=job, command=list(sys.argv), working_folder=os.getcwd(), environment=group)


def run_here(
    config: DictConfig, job: Callable[[DictConfig], Any], command: list[str], working_folder: str, environment: dict[str, str]
) -> Any:
    """The task of one job, in the process that the cluster started for it; returns its RunResult."""
    from sft.config.compose import register

    sys.argv[:] = command  # for the record
    os.environ.update(environment)
    os.chdir(working_folder)
    register()
    return job(config)


def hand_over(cluster: Cluster, jobs: list[Job], overrides: dict[int, list[str]], folder: Path) -> dict[str, Job]:
    """Start those of `jobs` that an earlier command did not leave in the queue; returns all of them by their id there."""
    left = cluster.alive([job.place for job in jobs if job.place])
    new = [job for job in jobs if job.place not in left]
    places = cluster.start(new, [[*overrides[job.number], *_folder_overrides(folder, job)] for job in new]) if new else []
    for job, place in zip(new, places, strict=True):
        job.place, job.status, job.attempts = place, WAITING, job.attempts + 1
        job.reason = f"handed over as {cluster.name} {place}"
    return {job.place: job for job in jobs}


def _folder_overrides(folder: Path, job: Job) -> list[str]:
    return [f"hydra.sweep.dir={_quoted(folder.resolve())}", f"hydra.sweep.subdir={_quoted(job.folder)}"]


def _quoted(value: Any) -> str:
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def watch(cluster: Cluster, places: dict[str, Job], folder: Path, changed: Callable[[Job], bool]) -> None:
    """Wait until all jobs of `places` have ended. `changed` is called with each one that began or ended; False stops the rest.

    An interruption stops them all, waits until they have saved, and is raised again.
    """
    left = dict(places)
    try:
        while left:
            left = _look(cluster, left, folder, changed)
            time.sleep(POLL if left else 0)
    except KeyboardInterrupt:
        cluster.stop(left)
        limit = time.monotonic() + STOP
        while left and time.monotonic() < limit:
            left = _look(cluster, left, folder, lambda job: changed(job) or True)
            time.sleep(POLL if left else 0)
        raise


def _look(cluster: Cluster, left: dict[str, Job], folder: Path, changed: Callable[[Job], bool]) -> dict[str, Job]:
    """Look at the jobs once; returns those that go on."""
    alive = cluster.alive(left)
    for place, job in left.items():
        if place not in alive:
            _end(cluster, job, folder / job.folder)
            if not changed(job):
                cluster.stop(alive)
        elif job.status == WAITING and read_run(folder / job.folder).get("status") == "running":
            job.status, job.reason = RUNNING, None
            changed(job)
    return {place: job for place, job in left.items() if place in alive}


def _end(cluster: Cluster, job: Job, folder: Path) -> None:
    """Write down how a job ended: by its run.json, or, where it could not write that, by what the cluster knows."""
    limit = time.monotonic() + SETTLE
    run = read_run(folder)
    while run.get("status") in (None, "running") and time.monotonic() < limit:
        time.sleep(POLL)
        run = read_run(folder)
    if run.get("status") in (None, "running"):
        status, reason = cluster.explain(job.place)
        folder.mkdir(parents=True, exist_ok=True)
        run = {"name": job.label, **run, "status": status, "reason": reason, "ended_at": jsonio.now()}
        jsonio.write_json(folder / "run.json", run)
    job.status, job.reason = judge(run)
    job.seconds, job.place = run.get("seconds", {}).get("total", job.seconds), None


def exit_code(job: Job) -> int:
    """0 finished, or stopped by its own time limit; 130 stopped from outside; 1 failed or diverged."""
    if job.status == STOPPED:
        return 0 if (job.reason or "").startswith("time limit") else 130
    return 0 if job.status == FINISHED else 1
