"""A job in a process of its own, so that a job which is killed takes nothing with it.

    python -m sft.sweep.isolate    reads one job from its standard input; only `run_apart` starts it

The pipe stays open while the parent lives. When it closes, the child ends at once: a job must not go on alone while the
repeated command continues it in the same folder.
"""

import contextlib
import logging.config
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft import runtime
from sft.errors import first_line
from sft.processes import child_environment, python_command
from sft.records import number, read_json
from sft.settings import Settings

HINTS = {
    "SIGKILL": "the system does this when memory runs out",
    "SIGSEGV": "a library broke down",
    "SIGABRT": "a library gave up",
}


def run_apart(settings: Settings, folder: Path, context: Any, logging_config: Any) -> Any:
    """`run()` in a child process; returns the same result. A child that was killed is a failed run with the signal named.

    Ctrl-C, SIGTERM and SIGHUP are passed on to the child, which saves and stops.
    """
    job = pickle.dumps((settings, folder, context, OmegaConf.to_container(logging_config, resolve=True)))
    child = subprocess.Popen(
        python_command("sft.sweep.isolate"),
        stdin=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,  # else the terminal's Ctrl-C would reach it twice, and the second one stops at once
    )
    with _passing_on(child):
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(len(job).to_bytes(8, "big") + job)
            child.stdin.flush()
        code = child.wait()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    return _result(folder, context, code)


@contextlib.contextmanager
def _passing_on(child: subprocess.Popen):
    before = {s: signal.signal(s, lambda number, _: child.send_signal(number)) for s in runtime.stop_signals()}
    try:
        yield
    finally:
        for number_, handler in before.items():
            signal.signal(number_, handler)


def _result(folder: Path, context: Any, code: int) -> Any:
    from sft.run import RunResult

    run = read_json(folder / "run.json")
    if code in (0, 1, 2, 130) and run.get("status") in ("finished", "stopped", "failed"):
        status = "refused" if code == 2 else run["status"]
        return RunResult(status, code, folder, number(run.get("metrics", {}).get("eval_loss")))
    if code == 130:
        return RunResult("stopped", code, folder)
    name = signal.Signals(-code).name if code < 0 else ""
    reason = f"killed by {name}" if name else f"the process ended with exit code {code}"
    reason += f" ({HINTS[name]})" if name in HINTS else ""
    print(runtime.safe(f"Failed: {reason}"), file=sys.stderr, flush=True)
    facts = {"name": context.name, "overrides": list(context.overrides), **run}
    facts |= {"status": "failed", "reason": reason, "ended_at": runtime.now()}
    folder.mkdir(parents=True, exist_ok=True)
    runtime.write_json(folder / "run.json", facts)
    return RunResult("failed", 1, folder)


def _end_with_parent() -> None:
    """Wait for the pipe to close, and end."""
    sys.stdin.buffer.read(1)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Run the job that arrives on the standard input; returns its exit code."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    settings, folder, context, logging_config = pickle.loads(sys.stdin.buffer.read(size))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.config.dictConfig(logging_config)
    from sft.distributed import launch
    from sft.run import guarded

    return guarded(lambda: launch(settings, folder, context), folder, context, sweeping=True).exit_code


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # before the run, which tells its own; Python's own way out would abort at the waiting thread
        print(runtime.safe(f"Failed: the job could not begin: {type(error).__name__}: {first_line(error)}"), file=sys.stderr)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the interpreter's clean-up, in which the waiting thread would hold the standard input
