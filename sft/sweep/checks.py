"""What a sweep is run with (a launcher, a search), and whether it can be used on this machine. Imports nothing heavy."""

import importlib.util
import shutil

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from sft.config.hardware import gpu_present
from sft.config.keys import find_field, plain_type
from sft.errors import Problem
from sft.sweep.grid import list_values

OWN = "hydra_plugins.sft_sweep."
"""Where the launchers are that keep a sweep's index and table."""

SLURM, RAY = "SlurmSweepLauncher", "RaySweepLauncher"

LAUNCHERS = """hydra/launcher=ray   side by side, one on each GPU of this machine, or on a Ray cluster
hydra/launcher=submitit_slurm   in Slurm's queue
hydra/launcher=sft   one after the other, which is the default"""

SEARCHES = """sweep=tpe   a search through Optuna: pip install -e ".[optuna]"
hydra/sweeper=sft   a grid, or what sweep= chooses, which is the default"""


def sweeper_params(means: DictConfig | None) -> list[str]:
    """What a preset or an experiment sweeps over by itself, as overrides. `means`: the composed `hydra` settings."""
    return [] if means is None else [f"{key}={value}" for key, value in (means.sweeper.get("params") or {}).items()]


def runs_elsewhere(means: DictConfig | None) -> bool:
    """Whether the jobs run on other machines, which may have what this one lacks. `means`: the composed `hydra` settings."""
    launcher = _launcher(means)
    return launcher == SLURM or (launcher == RAY and means.launcher.ray.init.get("address") is not None)


def is_search(means: DictConfig | None) -> bool:
    """Whether a sampler chooses the jobs, in place of a grid."""
    return means is not None and means.sweeper.get("sampler") is not None


def check_interval(override: Override) -> Problem:
    """The problem of an interval in a grid."""
    why = "A grid cannot try every value of an interval; a search draws from it."
    key, _, interval = override.input_line.partition("=")
    cls, name = find_field(override.key_or_group)
    drawn = f"int({interval})" if cls and plain_type(cls, name) is int and not interval.startswith("int(") else interval
    ends = ",".join(f"{float(end):g}" for end in list_values(override))
    fix = f"sweep=tpe '{key}={drawn}'   or   {key}={ends}   for its ends"
    return Problem(override.input_line, why, fix)


def check_means(means: DictConfig | None, overrides: list[Override], sweeping: bool) -> list[Problem]:
    """Problems of the chosen launcher and search: not installed, not on this machine, not for this sweep.

    `means` is None where neither was chosen.
    """
    return [*_check_launcher(means, sweeping), *_check_search(means, overrides)]


def _launcher(means: DictConfig | None) -> str:
    return "" if means is None else str(means.launcher.get("_target_", "")).rpartition(".")[2]


def _check_launcher(means: DictConfig | None, sweeping: bool) -> list[Problem]:
    launcher = _launcher(means)
    if launcher and not str(means.launcher.get("_target_")).startswith(OWN):
        what = f"hydra/launcher={means.runtime.choices.get('hydra/launcher')}"
        why = "A sweep's index, its table and the exit codes of its jobs need one of the project's launchers."
        return [Problem(what, why, LAUNCHERS)] if sweeping else []
    if launcher not in (SLURM, RAY):
        return []
    name, extra, plugin = {
        SLURM: ("hydra/launcher=submitit_slurm", "slurm", "hydra_submitit_launcher"),
        RAY: ("hydra/launcher=ray", "ray", "hydra_ray_launcher"),
    }[launcher]
    problems = []
    if not sweeping:
        problems.append(Problem(name, "It starts the jobs of a sweep, and this is a single run.", f"python train.py -m {name}"))
    if not _installed(plugin):
        problems.append(Problem(name, f"It needs {plugin}, which is not installed.", f'pip install -e ".[{extra}]"'))
    if launcher == SLURM and not shutil.which("sbatch"):
        fix = "run the command on a machine that can submit jobs, or leave hydra/launcher out"
        problems.append(Problem(name, "There is no Slurm here: the program sbatch is not found.", fix))
    if launcher == RAY:
        problems += _check_gpus(means.launcher.ray)
    return problems


def _check_gpus(ray: DictConfig) -> list[Problem]:
    """A Ray of this machine alone that has no GPU to give."""
    wanted = ray.remote.get("num_gpus") or 0
    if not wanted or ray.init.get("address") is not None or ray.init.get("num_gpus") is not None or gpu_present():
        return []
    why = "Each job would wait for a GPU, and none is found here."
    return [Problem(f"hydra.launcher.ray.remote.num_gpus={wanted:g}", why, "hydra.launcher.ray.remote.num_gpus=0")]


def _check_search(means: DictConfig | None, overrides: list[Override]) -> list[Problem]:
    problems = []
    if not is_search(means):
        return problems
    if not _installed("hydra_optuna_sweeper"):
        why = "A search needs hydra_optuna_sweeper, which is not installed."
        problems.append(Problem("hydra.sweeper.sampler", why, 'pip install -e ".[optuna]"   or   sweep=lr for a grid'))
    for key in ("n_trials", "n_jobs"):
        value = means.sweeper.get(key)
        if not isinstance(value, int) or value < 1:
            problems.append(
                Problem(f"hydra.sweeper.{key}={value}", "It has to be a whole number from 1.", f"hydra.sweeper.{key}=10")
            )
    set_apart = any(override.key_or_group in ("dataset.eval_path", "dataset.eval_split") for override in overrides)
    for override in overrides:
        line = override.input_line
        if override.key_or_group == "sweep.paired" and override.value():
            why = "A search draws each setting by itself."
            fix = "sweep.paired=[]   one setting may follow another instead: lora.lora_alpha='${lora.r}'"
            problems.append(Problem(line, why, fix))
        if override.key_or_group in ("method", "method.name") and override.is_discrete_sweep():
            why = "A search is for the best value of one figure, and the figures of two methods cannot be compared."
            problems.append(Problem(line, why, f"{override.get_key_element()}={next(override.sweep_iterator())}"))
        none = override.key_or_group == "dataset.eval_fraction" and not override.is_sweep_override() and override.value() == 0
        if none and not set_apart:
            why = "A search is for the best value on held-out rows, and nothing would be held out."
            problems.append(Problem(line, why, "dataset.eval_fraction=0.1"))
    return problems


def _installed(plugin: str) -> bool:
    return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
