"""Train one run, or sweep over many: python train.py --help

Nothing heavy is imported until the settings are known to be good.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from sft import settings, threads
from sft.command_line import stop_on_refusal
from sft.sweep import exit_codes, summarise

threads.spin_briefly()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(config: DictConfig) -> float | None:
    """One job: run it, keep its exit code, and give a sweeper the held-out loss."""
    from sft.run import run_job

    outcome = run_job(config)
    exit_codes.append(outcome.exit_code)
    if outcome.exit_code == 130:
        raise KeyboardInterrupt  # ends a sweep too
    return outcome.eval_loss


if __name__ == "__main__":
    settings.register()
    stop_on_refusal(Path(__file__).parent / "conf")
    try:
        train()
    except KeyboardInterrupt:
        exit_codes.append(130)
    finally:
        summarise()
    sys.exit(max(exit_codes, default=0))
