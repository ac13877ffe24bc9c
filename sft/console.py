"""What people see: the lines of the console and of train.log, without what a terminal would obey."""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

from sft.sanitize import shown, without_passwords
from sft.storage.atomic import drop_link


def safe(text: str) -> str:
    """A text for the terminal or the log: no control characters, no password of an address."""
    return without_passwords(shown(text))


def say(text: object) -> None:
    """Print to stderr. A terminal that is gone must not change how a program ends."""
    with contextlib.suppress(ValueError, OSError):
        print(safe(str(text)), file=sys.stderr, flush=True)


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
