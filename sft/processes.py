"""How this project starts processes of its own, with no folder of somebody else's on Python's path, and how they end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

from sft.paths import ROOT

KILLERS = {
    "SIGKILL": "the system does this when memory runs out",
    "SIGSEGV": "a library broke down",
    "SIGABRT": "a library gave up",
}


def python_command(module: str) -> list[str]:
    """The command that runs `module` of this project; `-P` keeps the current folder off Python's path."""
    return [sys.executable, "-P", "-m", module]


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment, with the project's root and only absolute folders in PYTHONPATH, and `extra`.

    W&B's own word for the service of this process stays here: it may be gone before the child asks for it.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT), *path]), **extra}


def killer_of(code: int) -> str:
    """The signal that killed a process with this exit code, with what it usually means; nothing where none did."""
    name = signal.Signals(-code).name if code < 0 else ""
    return f"{name} ({KILLERS[name]})" if name in KILLERS else name


@contextlib.contextmanager
def passing_on(children: list[subprocess.Popen], signals: Collection[signal.Signals]) -> Iterator[None]:
    """Send these signals on to the first of the children; where it is not there, they interrupt."""

    def pass_on(number: int, frame: Any) -> None:
        if not children or children[0].poll() is not None:
            raise KeyboardInterrupt(signal.Signals(number).name)
        children[0].send_signal(number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us handles signals
        before = {s: signal.signal(s, pass_on) for s in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(parent: int) -> None:
    """Have this process killed when the one that started it, `parent`, is gone: the same command may go on in its folder."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
