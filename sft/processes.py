"""How this project starts processes of its own: no folder of somebody else's is on Python's path there."""

import os
import sys

from sft.paths import ROOT


def python_command(module: str) -> list[str]:
    """The command that runs `module` of this project; `-P` keeps the current folder off Python's path."""
    return [sys.executable, "-P", "-m", module]


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment, with the project's root and only absolute folders in PYTHONPATH, and `extra`."""
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *path]), **extra}
