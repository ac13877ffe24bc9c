"""Random or Bayesian search through Hydra's own Optuna sweeper: `sweep=random`, `sweep=tpe`.

The sampler has a fixed seed and hears the same values, so the same command proposes the same settings again, and what
finished is found by them. Nothing is stored besides.
"""

from typing import Any

from omegaconf import DictConfig

from sft import console
from sft.config.method import MethodFacts


def make_search(sampler: Any, n_trials: int, n_jobs: int, params: DictConfig | None, method: MethodFacts) -> Any:
    """Hydra's sweeper for the best of `n_trials` jobs by the method's metric; `n_jobs` are proposed at a time.

    A job that failed is one without a value and ends nothing; one that diverged is infinitely bad.
    """
    import optuna
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSweeper(
        sampler=sampler,
        direction="maximize" if method.greater_is_better else "minimize",
        storage=None,
        study_name=None,
        n_trials=n_trials,
        n_jobs=n_jobs,
        max_failure_rate=1.0,
        search_space=None,
        custom_search_space=None,
        params=params,
    )


def search(sweeper: Any, arguments: list[str], method: MethodFacts) -> None:
    """Run a search to its end, also one whose jobs all failed: the table says why, and the exit code is theirs."""
    try:
        sweeper.sweep(arguments)
    except ValueError as error:  # Optuna's, asked for the best of none
        if "No trials are completed" not in str(error):
            raise
        console.say(f"Search no job has a {method.title}, so there are no best settings.")
