"""Where Hydra looks for launchers. What this one does is told in sft/sweep/launch.py."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SweepLauncher(Launcher):
    """Runs the jobs of a sweep one after the other, and only those that are not finished yet."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Find or make the sweep's folder, before Hydra writes into it."""
        from sft.sweep.launch import Sweep

        self.sweep = Sweep(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs; one result a job, also for those that were skipped."""
        return self.sweep.launch([list(overrides) for overrides in job_overrides])
