"""One run in several processes of this machine: start them, pass signals on, and say which one failed first.

python train.py distributed.num_processes=2 ...     `start` starts the ranks, which begin in `work`
"""

import contextlib
import logging.config
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sft import console, signals
from sft.config.hardware import processes_of
from sft.config.schema import Settings
from sft.distributed.group import TORCHRUN, current, is_first, launched, meet_at
from sft.errors import Refusal
from sft.processes import child_environment, end_with, killer_of, passing_on, python_command
from sft.storage import jsonio
from sft.storage.jsonio import read_json

KILL = 60
"""Seconds that `start` leaves the other ranks after one has died."""


# ------------------------------------------------------------------------------------------------ start, join, leave


def start(settings: Settings, folder: Path, context: Any) -> Any:
    """Run `settings` in processes of this machine; returns and raises what `run` does.

    Ctrl-C, SIGTERM and SIGHUP go to rank 0 alone, which decides for all. A rank that was killed makes the run a failed
    one, with the signal's name in run.json.
    """
    with tempfile.TemporaryDirectory(prefix="sft-ranks-", ignore_cleanup_errors=True) as place:  # for this user alone
        job, outcome = Path(place, "job"), Path(place, "outcome")
        job.write_bytes(pickle.dumps((settings, folder, context, os.getcwd(), os.getpid(), secrets.token_bytes(32))))
        failed = _run_ranks(job, processes_of(settings))
        result = pickle.loads(outcome.read_bytes()) if outcome.exists() else None
    if failed is None and isinstance(result, list):
        raise Refusal(result)
    if failed is None and isinstance(result, KeyboardInterrupt):
        raise result
    if failed is None and result is not None:
        return result
    return _failed(folder, context, *(failed or (0, 1)))


def launch(settings: Settings, folder: Path, context: Any) -> Any:
    """`run`, in as many processes as the settings say."""
    if processes_of(settings) > 1 and not launched():
        return start(settings, folder, context)  # each of them comes back to `run`
    from sft.lifecycle import run

    return run(settings, folder, context)


def work(job: Path) -> int:
    """One rank that `start` has started: run its part of the job; returns the exit code.

    Rank 0 leaves its result, or what it raised, in the file `outcome` beside the job.
    """
    settings, folder, context, place, parent, secret = pickle.loads(job.read_bytes())
    meet_at(job.with_name("store"), secret)
    os.chdir(place)
    end_with(parent)
    from sft.launch.follower import follow
    from sft.lifecycle import run

    if not is_first():
        return follow()
    if context.logging:
        folder.mkdir(parents=True, exist_ok=True)  # train.log opens in it
        logging.config.dictConfig(context.logging)
    try:
        result: Any = run(settings, folder, context)
    except Refusal as refusal:
        result = refusal.problems
    except KeyboardInterrupt as interrupt:
        result = interrupt
    work = job.with_name("outcome.part")
    work.write_bytes(pickle.dumps(result))
    work.rename(job.with_name("outcome"))
    group = current()
    return 1 if group and group.lost else 0


def _run_ranks(job: Path, count: int) -> tuple[int, int] | None:
    """Start the ranks and wait until all have ended; returns the number and exit code of the one that failed first."""
    children: list[subprocess.Popen] = []
    command = [*python_command("sft.launch.ranks"), str(job)]
    with passing_on(children, signals.stop_signals()):
        try:
            for rank in range(count):
                environment = _environment(job.parent, rank, count)
                # In a session of its own, since the terminal's Ctrl-C is passed on to rank 0 alone.
                children.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True))
            return _first_failure(children)
        finally:
            _end(children)


def _first_failure(children: list[subprocess.Popen]) -> tuple[int, int] | None:
    """Wait until all have ended, or one has failed; returns its number and exit code."""
    while True:
        codes = [child.poll() for child in children]
        if failed := [(rank, code) for rank, code in enumerate(codes) if code]:
            return min(failed, key=lambda pair: pair[1] > 0)  # a rank that was killed makes others fail, not they it
        if None not in codes:
            return None
        time.sleep(0.1)


def _end(children: list[subprocess.Popen]) -> None:
    """End those that are still there, after KILL seconds by force."""
    for child in children:
        child.terminate()
    limit = time.monotonic() + KILL
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, limit - time.monotonic()))
        child.kill()
        child.wait()


def _environment(place: Path, rank: int, count: int) -> dict[str, str]:
    """What a rank inherits: who it is, its share of the cores, loopback to talk over, and `place` for temporary files, since a
    rank that does not wait for its threads leaves them behind.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TMPDIR": place}
    ours["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // count)
    ours["GLOO_SOCKET_IFNAME"] = loopback
    ours["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME") or loopback
    plain = {key: value for key, value in child_environment().items() if key not in TORCHRUN}
    return plain | {key: str(value) for key, value in ours.items()}


def _failed(folder: Path, context: Any, rank: int, code: int) -> Any:
    """The result of a run one of whose ranks was lost. run.json gets the signal's name, which only the parent knows."""
    from sft.runs.record import RunResult

    record = read_json(folder / "run.json")
    reason = record.get("reason")
    if code < 0 or record.get("status") != "failed":
        killer = killer_of(code)
        reason = f"rank {rank} was killed by {killer}" if killer else f"rank {rank} ended with exit code {code}"
        console.say(f"Failed: {reason}")
    facts = {"name": context.name, "overrides": list(context.overrides), **record}
    folder.mkdir(parents=True, exist_ok=True)
    jsonio.write_json(folder / "run.json", {**facts, "status": "failed", "reason": reason, "ended_at": jsonio.now()})
    return RunResult("failed", 1, folder)


if __name__ == "__main__":
    code = work(Path(sys.argv[1]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
