"""Programs in processes of their own that find torch and the libraries loaded: forked from one that has imported them.

A process that imports them itself takes eight seconds for it, several times what a tiny run takes. All else is that of a
process: its folder, environment, signals, exit code and what it prints. Variables that are read where a library is imported
are those of the tests; a test of them, or of the imports, starts a real process. What such a program starts of this project
itself (ranks, jobs, exports, llama.cpp's converter) is forked too.
"""

import atexit
import functools
import gc
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import psutil

from sft.export.gguf import CONVERTER
from sft.model import warm_cache
from tests.conftest import ROOT

PRELOADED = ("sft.lifecycle", "sft.cli.job", "sft.cli.chat", "sft.export.exporter", "sft.methods.arguments", "sft.methods.sft",
             "sft.sweep.runner", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "tests.forked",
             "trl.trainer.sft_trainer", "tests.warmed")  # fmt: skip

MODULES = {"sft.launch.ranks": "sft/launch/ranks.py", "sft.launch.isolated": "sft/launch/isolated.py",
           "sft.export": "sft/export/__main__.py"}  # fmt: skip
started = subprocess.Popen


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    forkserver.ensure_running()
    return context


def _become(
    program: str, argv: list[str], place: str, environment: dict[str, str], before: str, files: list[str], parent: int,
    limits: tuple[int, int], leads: bool,
) -> None:  # fmt: skip
    """Be `python program *argv`, after the file `before`, with standard input, output and errors from and to `files`.

    `limits` are those of a file's size, as on a full disk; `leads` has it lead a session of its own.
    """
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # a child's child asks the same one
    subprocess.Popen = functools.partial(popen, before=before)
    if leads:
        os.setsid()
    if parent:  # of a child whose parent may watch over it
        os.getppid = lambda: parent if psutil.pid_exists(parent) else 1
    atexit._clear()  # what was to be done at the end of the process that this one was forked from
    gc.freeze()  # what the libraries hold is not looked through by each garbage collection
    warm_cache._frozen = True  # and a run that ends leaves it so
    tempfile.tempdir = None  # of this environment
    for descriptor, (file, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        opened = os.open(file, flags | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *argv]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if program.startswith(str(CONVERTER)):  # it brings a package `gguf` of its own
        sys.path.insert(0, str(CONVERTER))
        for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
            del sys.modules[name]
    if before:
        runpy.run_path(before)
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Process:
    """What is used of subprocess.Popen."""

    stdin = None

    def __init__(self, program, *argv, cwd, env=None, before="", files=(os.devnull, os.devnull, os.devnull), parent=0,
                 leads=False):  # fmt: skip
        files, argv = [str(file) for file in files], [str(word) for word in argv]
        words = str(ROOT / program), argv, str(cwd), dict(os.environ if env is None else env), str(before), files, parent
        words = *words, resource.getrlimit(resource.RLIMIT_FSIZE), leads
        self._process = _server().Process(target=_become, args=words)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Converter(Process):
    """What subprocess.run starts as llama.cpp's converter, and reads the output of."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.args, self.folder = command, tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        for file in self.files:
            file.touch()
        super().__init__(*command[2:], cwd=os.getcwd(), env=env, files=(os.devnull, *self.files), parent=os.getpid())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.folder.cleanup()

    def communicate(self, input=None, timeout=None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(file.read_text(encoding="utf-8", errors="replace") for file in self.files)


def popen(args, *more, before="", **options) -> subprocess.Popen | Process:
    """In place of subprocess.Popen: ranks, jobs and exports are forked, with the standard files of this process."""
    command = list(args) if isinstance(args, tuple) else args
    if len(command) > 2 and str(command[2]).startswith(str(CONVERTER)):
        return Converter(command, options["env"])
    program = MODULES.get(command[3]) if command[:3] == [sys.executable, "-P", "-m"] else None
    if command[:3] == [sys.executable, "-u", str(ROOT / "train.py")]:  # by torchrun
        command, program = command[:3] + command[2:], "train.py"
    if not program:
        return started(args, *more, **options)
    files = [f"/proc/{os.getpid()}/fd/{number}" for number in range(3)]
    if options.get("stdin") == subprocess.DEVNULL:
        files[0] = os.devnull
    elif options.get("stdin") == subprocess.PIPE:
        read, write = os.pipe()
        files[0] = f"/proc/{os.getpid()}/fd/{read}"
    words = {"cwd": os.getcwd(), "env": options["env"], "before": before, "files": files, "parent": os.getpid(),
             "leads": bool(options.get("start_new_session"))}  # fmt: skip
    process = Process(program, *command[4:], **words)
    if options.get("stdin") == subprocess.PIPE:
        process.stdin = os.fdopen(write, "wb")
    return process


def run(program, *argv, cwd, env=None, before="", text: str = "", timeout: float = 280) -> subprocess.CompletedProcess:
    """As subprocess.run(..., capture_output=True, text=True), with `text` to read, and a file of Python to run `before`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        for file in files:
            file.write_text(text if file.name == "in" else "", encoding="utf-8")
        process = Process(program, *argv, cwd=cwd, env=env, before=before, files=files)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        out, err = (file.read_text(encoding="utf-8") for file in files[1:])
        return subprocess.CompletedProcess([str(program), *argv], process.returncode, out, err)
