"""Where Hydra looks for sweepers and launchers. What these do is told in sft/sweep/launch.py."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SweepSweeper(BasicSweeper):
    """Hydra's own grid, with settings that go together, and without composing every job once more than is needed."""

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """The batches of jobs: one of all, or several of at most `max_batch_size`."""
        from sft.sweep.pairs import expand

        jobs = expand(overrides, list(self.config.sweep.paired))
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Left to the launcher, which composes all jobs before the first one runs."""


class SweepLauncher(Launcher):
    """Runs the jobs of a sweep one after the other, and only those that are not finished yet."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Find or make the sweep's folder, before Hydra writes into it."""
        from sft.sweep.launch import Sweep

        self.sweep = Sweep(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs; one result a job, also for those that were skipped."""
        return self.sweep.launch([list(overrides) for overrides in job_overrides])
