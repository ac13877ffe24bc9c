"""A dead rank ends the run within seconds, with its reason.

Every rank holds a line (a socket) to rank 0. What ends a rank is reported over it, and a line that breaks off says that a
process is gone, which a collective may wait for without end. Heartbeats in torch's store could not tell a dead process from one
that is paused or that holds Python's lock for seconds; the kernel closes a socket when the process ends, and only then.
"""

import contextlib
import json
import logging.config
import os
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from sft import console, signals
from sft.distributed.group import Group, broadcast, current, join, leave
from sft.errors import RankLost
from sft.storage import jsonio
from sft.storage.jsonio import read_json

log = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that rank 0 has to notice by itself that another rank is gone, in which it still saves nothing but its record."""

NEWS = 3.0
"""Seconds in which the line reports what made a collective fail."""


@contextlib.contextmanager
def together(job: Callable[[], Any]) -> Iterator[None]:
    """Rank 0's part of a run, between meeting the others and letting them go. `job()` is what the others are to do."""
    group = meet()
    if group is None:
        yield
        return
    broadcast(job())
    try:
        yield
    finally:
        _let_go(group)


def meet() -> Group | None:
    """Join the other ranks and open the lines: one that breaks off ends a rank by itself, and rank 0 after GRACE seconds."""
    join()
    group = current()
    if group and not group.lines:
        _open_lines(group)
    return group


def watch(record: Any) -> None:
    """Close this record as failed if another rank is gone and the main thread hangs because of it.

    Another rank than 0 gives the run folder, whose record it closes if rank 0 is gone.
    """
    if group := current():
        group.record = record


def find_cause(error: BaseException) -> BaseException:
    """The lost rank behind an error of this one, where there is one: its line tells within seconds."""
    group = current()
    if group and group.rank == 0:
        group.news.wait(NEWS)
        return group.lost or error
    return error


def wait_for_end() -> None:
    """Wait, as any rank but the first, until rank 0 has ended the run; the line's thread ends the process then."""
    threading.Event().wait()


def report(error: BaseException) -> None:
    """Tell rank 0 what ends this rank."""
    text = str(error).strip().splitlines()
    ending = {
        "reason": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }
    if group := current():
        with contextlib.suppress(OSError):
            group.lines[0].sendall(json.dumps(ending).encode() + b"\n")
        if group.news.wait(1.0):  # rank 0 is gone, and this one failed for it: the line's thread says so and ends the process
            wait_for_end()


def _let_go(group: Group) -> None:
    """End the run for all: the other ranks exit, their work being done or not."""
    import torch.distributed as dist

    group.over = True
    for line in group.lines:
        with contextlib.suppress(OSError):
            line.sendall(b"over\n")
            line.close()
    if group.lost is None:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        leave()


def _open_lines(group: Group) -> None:
    """A socket from each rank to rank 0, and a thread that listens at each end."""
    local = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if group.rank == 0:
        host = "127.0.0.1" if local else ""
        server = socket.create_server((host, 0), backlog=group.size)
        server.settimeout(120)
        word = secrets.token_hex(16)
        broadcast((server.getsockname()[1], word))
        while len(group.lines) < group.size - 1:
            line, _ = server.accept()
            line.settimeout(30)
            reader = line.makefile("rb")
            signature, _, rank = reader.readline(64).decode(errors="replace").strip().partition(" ")
            if not secrets.compare_digest(signature, word):
                line.close()  # somebody else's
                continue
            line.settimeout(None)
            group.lines.append(line)
            threading.Thread(target=_hear_rank, args=(group, int(rank), reader), daemon=True).start()
        server.close()
    else:
        port, word = broadcast(None)
        line = socket.create_connection(("127.0.0.1" if local else os.environ["MASTER_ADDR"], port), 120)
        line.settimeout(None)
        line.sendall(f"{word} {group.rank}\n".encode())
        group.lines.append(line)
        for number in signals.stop_signals():  # rank 0 hears them, and decides
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_hear_first, args=(group, line.makefile("rb")), daemon=True).start()
    broadcast(None)  # all lines stand


def _hear_rank(group: Group, rank: int, reader: Any) -> None:
    """Rank 0: wait for the end of another rank. One that comes before rank 0's own ends the run."""
    with contextlib.suppress(OSError):
        text = reader.readline()
    if group.over or group.lost:
        return
    ending = json.loads(text) if text else {"reason": "its process is gone, without a word"}
    group.lost = RankLost(f"rank {rank}: {ending['reason']}")
    group.lost.add_note(ending.get("traceback", ""))
    group.news.set()
    time.sleep(GRACE)
    if not group.over:  # the main thread waits in a collective that never ends
        if group.record:
            with contextlib.suppress(OSError):
                group.record.close("failed", str(group.lost))
        console.say(f"Failed: {group.lost}")
        os._exit(1)


def _hear_first(group: Group, reader: Any) -> None:
    """Another rank: end with rank 0, in the middle of whatever this rank waits for."""
    text = b""
    with contextlib.suppress(OSError):
        text = reader.readline()
    if text != b"over\n":
        group.news.set()
    if text != b"over\n" and group.rank == 1 and group.record:  # the ranks after it would say the same
        run = read_json(group.record / "run.json")
        if run.get("status") == "running":
            ending = {"status": "failed", "reason": "rank 0: its process is gone, without a word", "ended_at": jsonio.now()}
            jsonio.write_json(group.record / "run.json", {**run, **ending})
    os._exit(0 if text == b"over\n" else 1)
