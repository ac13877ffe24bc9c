"""Jobs of a sweep as Ray tasks, through Hydra's Ray launcher: `hydra/launcher=ray`.

Ray gives each job its own GPU, on this machine or on a cluster, and starts a job again whose process was killed; it then
goes on from its last checkpoint.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

from hydra.core.singleton import Singleton
from omegaconf import DictConfig, OmegaConf, open_dict

from sft.errors import first_line, refuse
from sft.sweep.cluster import make_task, run_here
from sft.sweep.index import FAILED, STOPPED, Job


class RayTasks:
    """Starts jobs with the settings of `hydra.launcher.ray`, which are those of Hydra's own Ray launcher."""

    name = "Ray task"

    def __init__(self, options: dict[str, Any], hydra_context: Any, config: DictConfig, job: Callable):
        self.options, self.context, self.config = OmegaConf.create(options), hydra_context, config
        self.task = make_task(run_here, job)
        self.tasks: dict[str, Any] = {}

    def start(self, jobs: list[Job], overrides: list[list[str]]) -> list[str]:
        """Start a task a job. Ray runs as many at a time as it has GPUs (or CPUs) for."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray, start_ray

        start_ray(self.options.init)
        self._check_resources()
        places = []
        for job, words in zip(jobs, overrides, strict=True):
            config = self.context.config_loader.load_sweep_config(self.config, words)
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = job.number
            task = launch_job_on_ray(self.context, self.options.remote, config, self.task, Singleton.get_state())
            places.append(task.hex())
            self.tasks[places[-1]] = task
        return places

    def _check_resources(self) -> None:
        """Raise Refusal if no machine could run a job: Ray would wait for ever."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for key, resource in (("num_gpus", "GPU"), ("num_cpus", "CPU")):
            wanted, most = self.options.remote.get(key) or 0, max(node.get(resource, 0) for node in nodes)
            if wanted > most:
                why = f"No machine of this Ray cluster has more than {most:g} {resource}."
                raise refuse(f"hydra.launcher.ray.remote.{key}={wanted:g}", why, f"hydra.launcher.ray.remote.{key}={most:g}")

    def alive(self, places: Iterable[str]) -> set[str]:
        """Those that Ray has not finished. Those of an earlier command ended with it."""
        import ray

        known = {place: self.tasks[place] for place in places if place in self.tasks}
        if not known:
            return set()
        _, left = ray.wait(list(known.values()), num_returns=len(known), timeout=0)
        return {task.hex() for task in left}

    def stop(self, places: Iterable[str]) -> None:
        """Interrupt them: a run saves and stops."""
        import ray

        for place in places:
            ray.cancel(self.tasks[place], force=False)

    def explain(self, place: str) -> tuple[str, str]:
        """By the error that Ray ended the task with."""
        import ray

        try:
            ray.get(self.tasks[place])
        except ray.exceptions.TaskCancelledError:
            return STOPPED, "interrupted before training"
        except Exception as error:
            return FAILED, f"{type(error).__name__}: {first_line(error)}"
        return FAILED, "the task ended and left no record"
