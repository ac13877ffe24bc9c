"""How torch's threads wait for each other on the CPU. Imports nothing heavy: it counts only before torch is loaded."""

import os

SPIN_COUNT = "3000"
"""Rounds that a thread of libgomp looks for work before it sleeps, where 300,000 are its default: beside other work the threads
that spin keep the cores from those that are waited for (benchmarks/threads.py)."""


def spin_briefly() -> None:
    """Let libgomp's threads sleep soon, here and in the processes started from here; how the user lets them wait stays."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
