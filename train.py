"""Train one run, or sweep over many: python train.py --help

Nothing heavy is imported until the settings are good.
"""

import sys

import hydra
from omegaconf import DictConfig

from sft import threads
from sft.cli import train as command

threads.spin_briefly()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(config: DictConfig) -> float | None:
    """One job. It stands here so that Hydra takes folders as relative to this file."""
    return command.train(config)


if __name__ == "__main__":
    sys.exit(command.main(train))
