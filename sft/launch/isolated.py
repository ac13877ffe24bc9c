"""A job in a process of its own, so that a job which is killed takes nothing with it.

    python -m sft.launch.isolated    reads one job from its standard input; only `run_apart` starts it

A child ends with its parent: a job must not go on alone while the repeated command continues it in the same folder.
"""

import contextlib
import logging.config
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft import console, signals
from sft.config.method import facts_of
from sft.config.schema import Settings
from sft.errors import first_line
from sft.processes import child_environment, end_with, killer_of, passing_on, python_command
from sft.storage import jsonio
from sft.storage.jsonio import number, read_json


def run_apart(settings: Settings, folder: Path, context: Any, logging_config: Any) -> Any:
    """`run()` in a child process; returns the same result. A child that was killed is a failed run with the signal named.

    Ctrl-C, SIGTERM and SIGHUP are passed on to the child, which saves and stops.
    """
    job = pickle.dumps((settings, folder, context, OmegaConf.to_container(logging_config, resolve=True), os.getpid()))
    child = subprocess.Popen(
        python_command("sft.launch.isolated"),
        stdin=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,  # else the terminal's Ctrl-C would reach it twice, and the second one stops at once
    )
    with passing_on([child], signals.stop_signals()):
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(job)
        code = child.wait()
    return _result(folder, context, code)


def _result(folder: Path, context: Any, code: int) -> Any:
    from sft.runs.record import RunResult

    run = read_json(folder / "run.json")
    if code in (0, 1, 2, 130) and run.get("status") in ("finished", "stopped", "failed"):
        status = "refused" if code == 2 else run["status"]
        return RunResult(status, code, folder, number(run.get("metrics", {}).get(facts_of(run).metric)))
    if code == 130:
        return RunResult("stopped", code, folder)
    killer = killer_of(code)
    reason = f"killed by {killer}" if killer else f"the process ended with exit code {code}"
    console.say(f"Failed: {reason}")
    facts = {"name": context.name, "overrides": list(context.overrides), **run}
    facts |= {"status": "failed", "reason": reason, "ended_at": jsonio.now()}
    folder.mkdir(parents=True, exist_ok=True)
    jsonio.write_json(folder / "run.json", facts)
    return RunResult("failed", 1, folder)


def main() -> int:
    """Run the job that arrives on the standard input; returns its exit code."""
    settings, folder, context, logging_config, parent = pickle.loads(sys.stdin.buffer.read())
    end_with(parent)
    logging.config.dictConfig(logging_config)
    from sft.launch.endings import guarded
    from sft.launch.ranks import launch

    return guarded(lambda: launch(settings, folder, context), folder, context, sweeping=True).exit_code


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # before the run, which tells its own; Python's own way out would abort at the waiting thread
        console.say(f"Failed: the job could not begin: {type(error).__name__}: {first_line(error)}")
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the interpreter's clean-up: nothing is left to do
