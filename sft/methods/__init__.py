"""What a method of training is: the columns a row needs, trainer and arguments, metric. The only package that imports TRL."""

import importlib

from sft.config.schema import Settings
from sft.methods.base import Method

METHODS = {"sft": "sft.methods.sft", "dpo": "sft.methods.dpo", "grpo": "sft.methods.grpo"}
"""The module of each method, which is a `Method`."""


def method_of(settings: Settings) -> Method:
    """The method that `settings` train by."""
    return importlib.import_module(METHODS[settings.method.name.value])
