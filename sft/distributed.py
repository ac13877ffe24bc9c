"""One run in several processes, one a GPU: who they are, what they agree on, and how they end.

Rank 0 is the run. It checks, writes the run folder, tracks, takes the answers, saves, and hears the signals. The other ranks
take over its settings, train on their share of each step's rows and write nothing; `run.follow` is their story. In a run of
one process every function here gives back what it was given.

    python train.py distributed.num_processes=2 ...     `start` starts the ranks, which begin in `work`
    torchrun --nproc-per-node 2 train.py ...            rank 0 is train.py as ever; the others leave it for `run.follow`

Every rank holds a line (a socket) to rank 0. What ends a rank is told over it, and a line that breaks off says that a process
is gone, which a collective may wait for without end.

Ranks that `start` has started meet through a file in a folder that this user alone can read, listen on loopback alone, and
unpickle only what is signed with a secret of that folder. What torchrun has started meets through torchrun's store, which
listens on all interfaces and has no secret.
"""

import contextlib
import hmac
import json
import logging.config
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from sft import runtime
from sft.errors import Refusal
from sft.processes import child_environment, end_with, killer_of, passing_on, python_command
from sft.records import read_json
from sft.settings import Settings
from sft.validate import processes_of

log = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that rank 0 has to notice by itself that another rank is gone, in which it still saves nothing but its record."""
NEWS = 3.0
"""Seconds in which the line tells what made a collective fail."""
KILL = 60
"""Seconds that `start` leaves the other ranks after one has died."""
WAIT = timedelta(days=7)
"""How long a rank waits for what rank 0 does alone: answers, a checkpoint. A dead rank 0 is told by the line."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK",
            "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
            "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE")  # fmt: skip


class RankLost(RuntimeError):
    """Another rank of the run is gone. The message says which, and why as far as it could tell."""


@dataclass
class Group:
    """The processes of this run, seen from one of them."""

    rank: int
    size: int
    control: Any
    """torch's process group for what is said on the CPU, whatever the gradients travel by."""
    lines: list[Any] = field(default_factory=list)
    """Rank 0: an open socket to each other rank. The others: the one to rank 0."""
    lost: RankLost | None = None
    """Why the run cannot go on: the first rank that ended without rank 0's leave."""
    news: threading.Event = field(default_factory=threading.Event)
    record: Any = None
    """Rank 0's run.json, and for the others its folder: to be closed where nobody else can."""
    over: bool = False
    """Whether rank 0 has ended the run, so that a line may close."""


_group: Group | None = None
_store: Path | None = None
"""The file through which ranks meet that `start` has started."""
_secret = b""
"""What those ranks sign with what they tell each other. Under torchrun there is none."""


# --------------------------------------------------------------------------------------------------- who is who


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _group.rank == 0 if _group else int(os.environ.get("RANK", "0")) == 0


def current() -> Group | None:
    """The processes of this run; None in a run of one process, and before they have joined."""
    return _group


def meet_at(store: Path, secret: bytes) -> None:
    """Let `join` meet the ranks of this machine through the file `store`, and sign what they tell each other with `secret`."""
    global _store, _secret
    _store, _secret = store, secret


def leave() -> None:
    """Be one process again."""
    global _group
    _group = None


def rank() -> int:
    """Number of this process among those that train together, once they have joined."""
    return _group.rank if _group else 0


def world_size() -> int:
    """Processes that train together, once they have joined."""
    return _group.size if _group else 1


def plain_environment() -> dict[str, str]:
    """The environment without torchrun's variables, for a process of another kind."""
    return {key: value for key, value in os.environ.items() if key not in TORCHRUN}


# ------------------------------------------------------------------------------------------------ start, join, leave


def start(settings: Settings, folder: Path, context: Any) -> Any:
    """Run `settings` in processes of this machine; returns and raises what `run` does.

    Ctrl-C, SIGTERM and SIGHUP go to rank 0 alone, which decides for all. A rank that was killed makes the run a failed
    one, with the signal's name in run.json.
    """
    with tempfile.TemporaryDirectory(prefix="sft-ranks-", ignore_cleanup_errors=True) as place:  # for this user alone
        job, answer = Path(place, "job"), Path(place, "answer")
        job.write_bytes(pickle.dumps((settings, folder, context, os.getcwd(), os.getpid(), secrets.token_bytes(32))))
        failed = _run_ranks(job, processes_of(settings))
        told = pickle.loads(answer.read_bytes()) if answer.exists() else None
    if failed is None and isinstance(told, list):
        raise Refusal(told)
    if failed is None and isinstance(told, KeyboardInterrupt):
        raise told
    if failed is None and told is not None:
        return told
    return _failed(folder, context, *(failed or (0, 1)))


def launch(settings: Settings, folder: Path, context: Any) -> Any:
    """`run`, in as many processes as the settings say."""
    if processes_of(settings) > 1 and not launched():
        return start(settings, folder, context)  # each of them comes back to `run`
    from sft.run import run

    return run(settings, folder, context)


def work(job: Path) -> int:
    """One rank that `start` has started: run its part of the job; returns the exit code.

    Rank 0 leaves its result, or what it raised, in the file `answer` beside the job.
    """
    settings, folder, context, place, parent, secret = pickle.loads(job.read_bytes())
    meet_at(job.with_name("store"), secret)
    os.chdir(place)
    end_with(parent)
    from sft.run import follow, run

    if not is_first():
        return follow()
    if context.logging:
        folder.mkdir(parents=True, exist_ok=True)  # train.log opens in it
        logging.config.dictConfig(context.logging)
    try:
        told: Any = run(settings, folder, context)
    except Refusal as refusal:
        told = refusal.problems
    except KeyboardInterrupt as interrupt:
        told = interrupt
    work = job.with_name("answer.part")
    work.write_bytes(pickle.dumps(told))
    work.rename(job.with_name("answer"))
    group = current()
    return 1 if group and group.lost else 0


def join() -> None:
    """Meet the other ranks, so that collectives work. Nothing happens in a run of one process, or a second time."""
    global _group
    if not launched() or _group:
        return
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    meeting: dict[str, Any] = {}  # torchrun's variables say where
    if _store:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # Other users of this machine reach loopback too: all objects that torch sends around, also for FSDP, are signed.
        dist.distributed_c10d._pickler, dist.distributed_c10d._unpickler = SignedPickler, SignedUnpickler
        meeting = {"store": dist.FileStore(str(_store), size), "rank": rank, "world_size": size}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **meeting)
    _group = Group(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=WAIT))


@contextlib.contextmanager
def together(job: Callable[[], Any]) -> Iterator[None]:
    """Rank 0's part of a run, between meeting the others and letting them go. `job()` is what the others are told to do."""
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
    told = {
        "reason": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }
    if group := current():
        with contextlib.suppress(OSError):
            group.lines[0].sendall(json.dumps(told).encode() + b"\n")
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
            said, _, rank = reader.readline(64).decode(errors="replace").strip().partition(" ")
            if not secrets.compare_digest(said, word):
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
        for number in runtime.stop_signals():  # rank 0 hears them, and decides
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_hear_first, args=(group, line.makefile("rb")), daemon=True).start()
    broadcast(None)  # all lines stand


def _hear_rank(group: Group, rank: int, reader: Any) -> None:
    """Rank 0: wait for the end of another rank. One that comes before rank 0's own ends the run."""
    with contextlib.suppress(OSError):
        text = reader.readline()
    if group.over or group.lost:
        return
    told = json.loads(text) if text else {"reason": "its process is gone, without a word"}
    group.lost = RankLost(f"rank {rank}: {told['reason']}")
    group.lost.add_note(told.get("traceback", ""))
    group.news.set()
    time.sleep(GRACE)
    if not group.over:  # the main thread waits in a collective that never ends
        if group.record:
            with contextlib.suppress(OSError):
                group.record.close("failed", str(group.lost))
        print(runtime.safe(f"Failed: {group.lost}"), file=sys.stderr, flush=True)
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
            ending = {"status": "failed", "reason": "rank 0: its process is gone, without a word", "ended_at": runtime.now()}
            runtime.write_json(group.record / "run.json", {**run, **ending})
    os._exit(0 if text == b"over\n" else 1)


def _run_ranks(job: Path, count: int) -> tuple[int, int] | None:
    """Start the ranks and wait until all have ended; returns the number and exit code of the one that failed first."""
    children: list[subprocess.Popen] = []
    command = [*python_command("sft.distributed"), str(job)]
    with passing_on(children, runtime.stop_signals()):
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
    from sft.run import RunResult

    record = read_json(folder / "run.json")
    reason = record.get("reason")
    if code < 0 or record.get("status") != "failed":
        killer = killer_of(code)
        reason = f"rank {rank} was killed by {killer}" if killer else f"rank {rank} ended with exit code {code}"
        print(runtime.safe(f"Failed: {reason}"), file=sys.stderr, flush=True)
    facts = {"name": context.name, "overrides": list(context.overrides), **record}
    folder.mkdir(parents=True, exist_ok=True)
    runtime.write_json(folder / "run.json", {**facts, "status": "failed", "reason": reason, "ended_at": runtime.now()})
    return RunResult("failed", 1, folder)


# ------------------------------------------------------------------------------------------------------ agreements


def broadcast(value: Any) -> Any:
    """What rank 0 has; the others' values are not looked at."""
    if _group is None:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group.control)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in order."""
    if _group is None:
        return [value]
    import torch.distributed as dist

    values = [None] * _group.size
    dist.all_gather_object(values, value, group=_group.control)
    return values


class SignedPickler:
    """Writes a value behind its signature."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def dump(self, value: Any) -> None:
        """Write it."""
        text = pickle.dumps(value)
        self.file.write(hmac.digest(_secret, text, "sha256") + text)


class SignedUnpickler:
    """Reads a value that another rank has signed."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def load(self) -> Any:
        """Read it; raises RuntimeError, and unpickles nothing, if somebody else has written it."""
        signature, text = self.file.read(32), self.file.read()
        if not hmac.compare_digest(signature, hmac.digest(_secret, text, "sha256")):
            raise RuntimeError("what came from another process of the run is not signed by it")
        return pickle.loads(text)


def total(value: Any) -> float:
    """The sum over all ranks, the same to the last bit on each. Waits for the device."""
    return sum(gathered(float(value))) if _group else float(value)


def any_of(flag: Any) -> Any:
    """Whether a boolean tensor is true on any rank; it stays on its device."""
    if _group is None:
        return flag
    import torch
    import torch.distributed as dist

    number = flag.to(torch.int32)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.bool()


class SharedStop(runtime.StopRequest):
    """A stop that all ranks answer at the same step: rank 0 hears of it, and tells the others where they ask together."""

    def __init__(self) -> None:
        super().__init__()
        self.agreed: str | None = None
        """The signal that all ranks know of."""

    @property
    def wanted(self) -> bool:
        """Whether training has to end after this step."""
        return bool(self.agreed or self.out_of_time or self.failure)

    def agree(self) -> None:
        """Take over what rank 0 knows. Every rank has to call it."""
        self.agreed, self.out_of_time = broadcast((self.signal, self.out_of_time))
        self.signal = self.signal or self.agreed

    def check(self) -> None:
        """Raise Interrupted on all ranks if a signal came. Every rank has to call it."""
        self.agree()
        if self.agreed:
            raise runtime.Interrupted(self.agreed)

    def _receive(self, number: int, frame: Any) -> None:
        # The parent sends SIGTERM when another rank has died. Then there is nothing to stop cleanly.
        if number == signal.SIGTERM and (group := current()) and group.news.wait(1.0):
            return
        super()._receive(number, frame)


def stop_request() -> runtime.StopRequest:
    """What hears of Ctrl-C, SIGTERM and SIGHUP in this run."""
    return SharedStop() if current() else runtime.StopRequest()


def alone(action: Callable[..., None]) -> Callable[..., None]:
    """`action`, done by rank 0 while the others wait for it; Interrupted there is raised on all."""

    def act(*given: Any, **named: Any) -> None:
        signal_ = None
        if is_first():
            try:
                action(*given, **named)
            except runtime.Interrupted as interrupt:
                signal_ = str(interrupt)
        if signal_ := broadcast(signal_):
            raise runtime.Interrupted(signal_)

    return act if current() else action


@contextlib.contextmanager
def shared_folder(writing: contextlib.AbstractContextManager[Path]) -> Iterator[Path]:
    """The folder that `writing` gives to rank 0, for all ranks to write into; it counts when the last one is done."""
    group = current()
    if group is None:
        with writing as work:
            yield work
    elif group.rank == 0:
        with writing as work:
            broadcast(work)
            yield work
            gathered(None)
        broadcast(None)
    else:
        yield broadcast(None)
        gathered(None)
        broadcast(None)


if __name__ == "__main__":
    from sft import distributed  # not this file's own copy, which is named __main__

    code = distributed.work(Path(sys.argv[1]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
