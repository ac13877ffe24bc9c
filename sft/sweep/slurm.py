"""Jobs of a sweep as a Slurm job array, through Hydra's submitit launcher: `hydra/launcher=submitit_slurm`.

A job that Slurm takes off its node, or that reaches its time limit, saves, is queued again and goes on from where it was.
"""

import logging
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from omegaconf import DictConfig

from sft.errors import refuse
from sft.sweep.cluster import make_task, run_here
from sft.sweep.index import FAILED, STOPPED, Job

log = logging.getLogger(__name__)

CUT = ("CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "REVOKED")
"""States of a Slurm job that was taken off its node, which says nothing against its settings."""


class SlurmJobs:
    """Submits jobs with the settings of `hydra.launcher`, which are those of Hydra's own submitit launcher."""

    name = "Slurm job"
    responds = True
    """Whether Slurm did at the last request."""

    def __init__(self, options: dict[str, Any], folder: Path, hydra_context: Any, config: DictConfig, job: Callable):
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

        self.options = {**options, "submitit_folder": str(folder.resolve() / options["submitit_folder"])}
        self.launcher = SlurmLauncher(**self.options)
        self.launcher.setup(hydra_context=hydra_context, task_function=make_task(run_in_slurm, job), config=config)

    def start(self, jobs: list[Job], overrides: list[list[str]]) -> list[str]:
        """Submit one array; at most `hydra.launcher.array_parallelism` of its jobs run at the same time."""
        from submitit.core.utils import FailedJobError

        executor = self._make_executor()
        state = Singleton.get_state()
        try:
            with executor.batch():
                submitted = [
                    executor.submit(self.launcher, words, "hydra.sweep.dir", job.number, str(job.number), state)
                    for job, words in zip(jobs, overrides, strict=True)
                ]
        except (FailedJobError, subprocess.SubprocessError) as error:
            lines = [line for line in str(error).splitlines() if "sbatch" in line] or str(error).splitlines()
            fix = "hydra.launcher.partition=... and the like; hydra.launcher.gpus_per_node=null where there is no GPU"
            raise refuse("hydra/launcher=submitit_slurm", f"Slurm does not take the jobs: {lines[-1]}.", fix) from None
        return [job.job_id for job in submitted]

    def _make_executor(self) -> Any:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        options = dict(self.options)
        folder, retries = options.pop("submitit_folder"), options.pop("max_num_timeout")
        shared = BaseQueueConf.__dataclass_fields__
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=retries)
        executor.update_parameters(**{key if key in shared else f"slurm_{key}": value for key, value in options.items()})
        return executor

    def alive(self, places: Iterable[str]) -> set[str]:
        """Those that Slurm's queue holds; all of them while Slurm does not answer."""
        places = set(places)
        if not places:
            return places
        queue = subprocess.run(
            ["squeue", "--me", "--array", "--noheader", "--format=%i"], capture_output=True, text=True, check=False
        )
        if queue.returncode and self.responds:
            log.warning("Slurm does not answer (%s); waiting until it does.", queue.stderr.strip())
        self.responds = not queue.returncode
        return places & set(queue.stdout.split()) if self.responds else places

    def stop(self, places: Iterable[str]) -> None:
        """Cancel them. Slurm sends SIGTERM first, on which a run saves and stops."""
        if places := list(places):
            subprocess.run(["scancel", *places], capture_output=True, check=False)

    def explain(self, place: str) -> tuple[str, str]:
        """By the state that Slurm remembers for some minutes."""
        shown = subprocess.run(["scontrol", "show", "job", "--oneliner", place], capture_output=True, text=True, check=False)
        facts = dict(word.partition("=")[::2] for word in shown.stdout.split())
        state = facts.get("JobState", "ended, and Slurm no longer knows how")
        return STOPPED if state in CUT else FAILED, f"Slurm job {place}: {state}; its log: {facts.get('StdErr', '?')}"


def run_in_slurm(config: DictConfig, **surroundings: Any) -> None:
    """A job's task on its node. Stopped there, it leaves no result, so that the sweep asks Slurm what becomes of the job.

    SIGTERM (pre-emption, `scontrol requeue`, `scancel`): the run saves and stops, and Slurm queues the job again where it
    means to. SIGUSR2 (`hydra.launcher.signal_delay_s` before the time limit): the run saves and stops, and then submitit
    queues the job again, at most `hydra.launcher.max_num_timeout` times.
    """
    queue_again, ignore = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)  # submitit's
    warned = []

    def save_first(number: int, frame: Any) -> None:
        warned.append(number)
        if signal.getsignal(signal.SIGTERM) == ignore:
            raise KeyboardInterrupt("SIGUSR2")  # the run does not listen yet: there is nothing to save
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGUSR2, save_first)
    result = run_here(config, **surroundings)
    if result.status != "stopped":
        return
    if warned:
        queue_again(signal.SIGUSR2, None)  # ends the process
    if result.exit_code == 130:
        raise SystemExit(130)
