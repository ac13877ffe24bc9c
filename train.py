"""Train one run, or sweep over many: python train.py --help

Nothing heavy is imported until the settings are good.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from sft import threads
from sft.cli.check import stop_on_refusal
from sft.config import compose
from sft.sweep import exit_codes, summarise

threads.spin_briefly()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(config: DictConfig) -> float | None:
    """One job: run it, keep its exit code, and give a sweeper what ranks it."""
    from sft.cli.job import run_job

    outcome = run_job(config)
    exit_codes.append(outcome.exit_code)
    if outcome.exit_code == 130:
        raise KeyboardInterrupt  # ends a sweep too
    return outcome.metric


if __name__ == "__main__":
    compose.register()
    stop_on_refusal(Path(__file__).parent / "conf")
    try:
        train()
    except KeyboardInterrupt:
        exit_codes.append(130)
    finally:
        summarise()
    sys.exit(max(exit_codes, default=0))
