"""What a chat template or a regular expression may take for one row. Both can be written so that they never end."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

SECONDS = 10.0

GIB = 4.0


class OverLimit(Exception):
    """A row took more than SECONDS, or GIB more memory."""


@contextlib.contextmanager
def seconds_limited() -> Iterator[Callable[[], None]]:
    """Yields a function that begins the time of a row; OverLimit is raised in the block once a row has taken SECONDS.

    Python runs signal handlers in the main thread alone, and there is no other way to end a regular expression: elsewhere
    nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield lambda: None
        return

    def stop(number: int, frame: object) -> None:
        raise OverLimit(f"It takes more than {SECONDS:g} seconds.")

    before, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


@contextlib.contextmanager
def memory_limited() -> Iterator[None]:
    """Raise OverLimit where the block takes GIB more of the address space; Linux alone has such a limit.

    It counts for the whole process: no other thread may work meanwhile.
    """
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + int(GIB * 2**30)
    limits = [value for value in (soft, hard) if value != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *limits]), hard))
    try:
        yield
    except MemoryError as error:
        raise OverLimit(f"It takes more than {GIB:g} GiB of memory.") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
