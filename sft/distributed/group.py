"""The processes of one run: who they are, how they meet, and what they agree on.

Rank 0 is the run. It checks, writes the run folder, tracks, generates samples, saves, and hears the signals. The other ranks
take over its settings, train on their share of each step's rows and write nothing: `launch.follower` is their story. In a run
of one process every function here returns what it was given.

Ranks that `launch.ranks.start` has started meet through a file in a folder that this user alone can read, listen on loopback
alone, and unpickle only what is signed with a secret of that folder. What torchrun has started meets through torchrun's
store, which listens on all interfaces and has no secret.
"""

import contextlib
import hmac
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from sft import signals
from sft.errors import RankLost

WAIT = timedelta(days=7)
"""How long a rank waits for what rank 0 does alone: completions, a checkpoint. A dead rank 0 is reported by the line."""

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK",
            "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
            "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE")  # fmt: skip


@dataclass
class Group:
    """The processes of this run, seen from one of them."""

    rank: int
    size: int
    control: Any
    """torch's process group for messages on the CPU, whatever the gradients travel by."""
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
"""What those ranks sign their messages to each other with. Under torchrun there is none."""


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
    """Let `join` meet the ranks of this machine through the file `store`, and sign their messages with `secret`."""
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


def alone(action: Callable[..., None]) -> Callable[..., None]:
    """`action`, done by rank 0 while the others wait for it; Interrupted there is raised on all."""

    def act(*given: Any, **named: Any) -> None:
        signal_ = None
        if is_first():
            try:
                action(*given, **named)
            except signals.Interrupted as interrupt:
                signal_ = str(interrupt)
        if signal_ := broadcast(signal_):
            raise signals.Interrupted(signal_)

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
