"""Train one run, or sweep over many, with the words of the command line.

Nothing heavy is imported until the settings are good.
"""

import sys
from collections.abc import Callable

import hydra
from omegaconf import DictConfig

from sft import console
from sft.cli.check import stop_on_refusal
from sft.config import compose
from sft.paths import CONF
from sft.sweep import exit_codes, summarise


def train(config: DictConfig) -> float | None:
    """One job: run it, keep its exit code, and give a sweeper what ranks it."""
    from sft.cli.job import run_job

    outcome = run_job(config)
    exit_codes.append(outcome.exit_code)
    if outcome.exit_code == 130:
        raise KeyboardInterrupt  # ends a sweep too
    return outcome.metric


def main(start: Callable[[], None] | None = None) -> int:
    """Do what `sys.argv` asks for; returns the exit code. `start` is `train` under Hydra, where that is another program's."""
    wanted = "--json" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--json"]  # Hydra has no such flag
    with console.json_output(wanted):
        return _main(start)


def _main(start: Callable[[], None] | None) -> int:
    compose.register()
    stop_on_refusal(CONF)
    try:
        (start or hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(train))()
    except KeyboardInterrupt:
        exit_codes.append(130)
    finally:
        summarise()
    return max(exit_codes, default=0)


def run(argv: list[str]) -> int:
    """`main` for these words."""
    sys.argv[1:] = argv
    return main()
