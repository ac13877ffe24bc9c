"""What people see: the lines of the console and of train.log, without what a terminal would obey."""

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sft.sanitize import shown, without_passwords
from sft.storage.atomic import drop_link
from sft.storage.jsonio import jsonable

_json_to: list[TextIO] = []
"""Standard output, where `--json` was typed: it takes one JSON object and nothing else."""


def safe(text: str) -> str:
    """A text for the terminal or the log: no control characters, no password of an address."""
    return without_passwords(shown(text))


def say(text: object) -> None:
    """Print to stderr. A terminal that is gone must not change how a program ends."""
    with contextlib.suppress(ValueError, OSError):
        print(safe(str(text)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def json_output(wanted: bool = True) -> Iterator[None]:
    """Leave standard output to `say_json`; whatever else is printed in the block goes to stderr."""
    if not wanted:
        yield
        return
    _json_to.append(sys.stdout)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _json_to.pop()


def takes_json(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """A command's `main` that takes `--json`, which its words are then without."""

    @functools.wraps(main)
    def with_json(argv: list[str]) -> int:
        with json_output("--json" in argv):
            return main([word for word in argv if word != "--json"])

    return with_json


def wants_json() -> bool:
    """Whether `--json` was typed."""
    return bool(_json_to)


def say_json(content: dict[str, Any]) -> None:
    """Print the one JSON object. A reader that is gone must not change how a program ends."""
    with contextlib.suppress(ValueError, OSError):
        print(json.dumps(jsonable(content), indent=1), file=_json_to[-1], flush=True)


def say_refusal(refusal: Any) -> None:
    """Print a refusal to stderr, or as `{"refused": [...]}` where `--json` was typed."""
    if wants_json():
        say_json({"refused": refused(refusal.problems)})
    else:
        say(refusal)


def refused(problems: list[Any]) -> list[dict[str, str]]:
    """Problems as plain values."""
    return [{key: safe(getattr(problem, key)) for key in ("what", "why", "fix")} for problem in problems]


class ConsoleHandler(logging.StreamHandler):
    """Writes to stderr through tqdm, so that a line does not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with contextlib.suppress(ValueError, OSError):  # a closed terminal must not end a run
            tqdm.write(safe(mark + self.format(record)), file=sys.stderr)


class LogFile(logging.FileHandler):
    """train.log. A line that the disk does not take is lost in silence: the run says itself what is wrong with the disk."""

    def _open(self) -> Any:
        drop_link(Path(self.baseFilename))
        return super()._open()

    def format(self, record: logging.LogRecord) -> str:
        """The line as a terminal may show it: `cat` and `tail -f` would send on what rows and file names hold."""
        return safe(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing, in place of a traceback a line on the terminal."""


def duration(seconds: float) -> str:
    """Seconds for people, as `12 min`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
