"""Where Hydra looks for sweepers and launchers. What these do is in sft/sweep/runner.py."""

import logging
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

# It comes with Optuna, which Hydra imports for the sampler before it makes the sweeper, and names each of its plugins.
logging.getLogger("alembic").setLevel(logging.WARNING)


class SweepSweeper(BasicSweeper):
    """Hydra's own grid, with settings that go together, and without composing every job once more than is needed.

    With a `sampler` it is a search by Hydra's own Optuna sweeper instead.
    """

    def __init__(
        self, max_batch_size: int | None, params: DictConfig | None, sampler: Any = None, n_trials: int = 20, n_jobs: int = 1
    ):
        super().__init__(max_batch_size, params)
        self.sampler, self.n_trials, self.n_jobs = sampler, n_trials, n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Set up the grid or the search, and the launcher with it."""
        given = {"hydra_context": hydra_context, "task_function": task_function, "config": config}
        if self.sampler is None:
            return super().setup(**given)
        from sft.config.method import facts_of
        from sft.sweep.search import make_search

        name = config.method.name
        self.method = facts_of({"settings": {"method": {"name": getattr(name, "value", name)}}})
        self.search = make_search(self.sampler, self.n_trials, self.n_jobs, self.params, self.method)
        self.search.setup(**given)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the grid, or the search."""
        if self.sampler is None:
            return super().sweep(arguments)
        from sft.sweep.search import search

        return search(self.search, arguments, self.method)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """The batches of jobs: one of all, or several of at most `max_batch_size`."""
        from sft.sweep.grid import expand

        jobs = expand(overrides, list(self.config.sweep.paired))
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Left to the launcher, which composes all jobs before the first one runs."""


class SweepLauncher(Launcher):
    """Runs the jobs of a sweep one after the other, and only those that are not finished yet."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Find or make the sweep's folder, before Hydra writes into it."""
        from sft.sweep.runner import Sweep

        self.sweep = Sweep(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs; one result a job, also for those that were skipped."""
        return self.sweep.launch([list(overrides) for overrides in job_overrides])


class SlurmSweepLauncher(SweepLauncher):
    """The same sweep with its jobs in Slurm: hydra/launcher=submitit_slurm."""

    def __init__(self, **options: Any):
        self.options = _plain(options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Find or make the sweep's folder."""
        from sft.sweep.runner import Sweep
        from sft.sweep.slurm import SlurmJobs

        def make(sweep: Sweep) -> SlurmJobs:
            return SlurmJobs(self.options, sweep.folder, hydra_context, config, run_job)

        self.sweep = Sweep(hydra_context, task_function, config, make)


class RaySweepLauncher(SweepLauncher):
    """The same sweep with its jobs as Ray tasks: hydra/launcher=ray."""

    def __init__(self, ray: DictConfig):
        self.options = _plain(ray)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Find or make the sweep's folder."""
        from sft.sweep.ray_cluster import RayTasks
        from sft.sweep.runner import Sweep

        def make(_: Sweep) -> RayTasks:
            return RayTasks(self.options, hydra_context, config, run_job)

        self.sweep = Sweep(hydra_context, task_function, config, make)


def run_job(config: DictConfig) -> Any:
    """One job of a sweep, in whatever process it runs."""
    from sft.cli.job import run_job

    return run_job(config)


def _plain(options: Any) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.create(options), resolve=True)
