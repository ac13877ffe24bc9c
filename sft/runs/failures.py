"""What a run that failed says: its reason in one line, what to do about it, and the traceback for the log."""

import contextlib
import errno
import logging
import traceback
from pathlib import Path

from sft import console, errors
from sft.errors import ModelFault, Refusal, SaveFailed, first_line
from sft.sanitize import without_passwords
from sft.storage import atomic

log = logging.getLogger(__name__)


def reason_of(error: BaseException) -> str:
    """One line for run.json and the terminal, without passwords."""
    if isinstance(error, errors.RankLost | ModelFault):
        return without_passwords(str(error))
    if isinstance(error, Refusal):
        return without_passwords("; ".join(f"{p.what}: {p.why}" for p in error.problems))
    lines = without_passwords(str(error)).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    # transformers wraps what goes wrong at an import several times; only the innermost error says what it was.
    root = error
    while root.__cause__:
        root = root.__cause__
    return (
        text if root is error or first_line(root) in text else f"{text} (because of {type(root).__name__}: {first_line(root)})"
    )


def log_failure(error: BaseException, folder: Path) -> None:
    """One line on the terminal, with what to do where that is known, and the traceback in train.log."""
    log.error("Failed: %s", reason_of(error))
    for hint in _hints(error):
        log.error("hint: %s", hint)
    with contextlib.suppress(OSError):
        atomic.drop_link(folder / "train.log")
        with open(folder / "train.log", "a", encoding="utf-8") as file:
            file.write(console.safe("".join(traceback.format_exception(error))))


def _hints(error: BaseException) -> list[str]:
    if type(error).__name__ == "OutOfMemoryError":
        ways = "trainer.gradient_checkpointing=true   model.load_in_4bit=true   model.max_seq_length=... dataset.overlong=drop"
        return [f"not even one row at a time fits: {ways}", "more ways in docs/troubleshooting.md"]
    if isinstance(error, SaveFailed) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        return ["make room on the disk, or mend it; then the same command goes on from the last checkpoint"]
    return []


def error_facts(error: BaseException) -> dict[str, str]:
    """What run.json keeps of an error that is being handled."""
    trace = "".join([traceback.format_exc(), *getattr(error, "__notes__", ())])
    facts = {"type": type(error).__name__, "message": str(error), "traceback": trace}
    return {key: without_passwords(text) for key, text in facts.items()}
