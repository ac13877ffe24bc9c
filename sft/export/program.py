"""python program.py SCRIPT ARGUMENTS: run a script that ends when the process that started it does.

A killed export would leave a converter behind that goes on writing into the run's folder, beside the export that is made
anew. Imports nothing of this project.
"""

import ctypes
import runpy
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends; elsewhere it lives on to its own end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
