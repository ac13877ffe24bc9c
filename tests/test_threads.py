"""Threads that wait on the CPU sleep soon, in every program that loads torch and in what it starts."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LOOK = """
import json, os, runpy, subprocess, sys
runpy.run_path(sys.argv[1], run_name="looked at")
asked = [sys.executable, "-c", "import os; print(os.environ.get('GOMP_SPINCOUNT'))"]
child = subprocess.run(asked, capture_output=True, text=True)
print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), child.stdout.strip(), "torch" in sys.modules]))
"""


def look(program: str, **given: str) -> list:
    """[the variable in the program's process, in a child of it, whether torch was loaded by then]."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    command = [sys.executable, "-c", LOOK, str(ROOT / program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "program", ["train.py", "scripts/export.py", "scripts/chat.py", "scripts/preview.py", "tests/faults/fault_injection.py"]
)
def test_a_program_that_will_load_torch_lets_threads_spin_briefly_before_it_does(program):
    assert look(program) == ["3000", "3000", False]


@pytest.mark.parametrize(
    ("given", "stays"), [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)], ids=["count", "policy"]
)
def test_how_the_user_lets_threads_wait_stays(given, stays):
    assert look("train.py", **given) == [stays, str(stays), False]
