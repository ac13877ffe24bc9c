"""Types the hints of refusals, as a reader of one would, so that a test can demand that the command gets further."""

import re
import shlex
from collections.abc import Callable, Iterable

from sft.cli.check import check_command_line
from sft.config import schema
from sft.config.keys import find_field
from sft.config.upstream import sft_config_options
from sft.errors import Problem, Refusal
from tests.conftest import ROOT

# What stands for something that the reader has to fill in: `<column>`, `a=...`, `/path/to/a/file`; and what installs packages.
PLACEHOLDER = re.compile(r"<[^<>|]+>|\.\.\.|/path/to|my_data\.jsonl|install_gguf")

PROGRAM = re.compile(r"train\.py|scripts/\w+\.py")

OVERRIDE = re.compile(r"[+~]{0,2}[\w./@-]+=.*", re.S)


def hints_of(problem: Problem) -> list[list[str]]:
    """The hints that can be typed, each as the words that a shell gives to train.py; alternatives are hints of their own.

    A whole command begins with its program.
    """
    return [words for _, words in _split(problem) if words]


def untyped(problem: Problem) -> list[str]:
    """The hints that cannot be typed as they stand: advice, other programs, examples and what holds a placeholder."""
    return [text for text, words in _split(problem) if not words]


def _split(problem: Problem) -> list[tuple[str, list[str]]]:
    """(hint, its words) of each line and alternative; no words where it cannot be typed."""
    hints = [hint.strip() for line in problem.fix.splitlines() for hint in line.split("   or   ")]
    return [(hint, _words(hint)) for hint in hints]


def _words(hint: str) -> list[str]:
    """The words of a hint, without the explanation after three spaces."""
    command, _, explanation = hint.partition("   ")
    if PLACEHOLDER.search(command) or explanation == "for example":
        return []
    try:
        words = shlex.split(command.removeprefix("python "))
    except ValueError:  # an apostrophe in a sentence
        return []
    words = words[1:] if words[:1] == ["train.py"] and words[1:2] and words[1].startswith("-") else words
    known = words and (words[0].startswith("-") or all(map(OVERRIDE.fullmatch, words[bool(PROGRAM.fullmatch(words[0])) :])))
    return words if known else []


def typed(argv: Iterable[str], problem: Problem, hint: list[str]) -> list[str]:
    """The command line with a hint typed: what the hint sets anew, or the problem names as misspelt, is gone; the rest stays.

    A run that goes on takes its own settings, and flags alone are a command of their own.
    """
    keys = {_key(word) for word in hint}
    flags = [word for word in hint if word.startswith("-")]
    if "resume" in keys or not any(map(OVERRIDE.fullmatch, hint)) or PROGRAM.fullmatch(hint[0]):
        return hint
    kept = [word for word in argv if not _is_set(word, hint) and not _is_misspelt(word, problem, hint)]
    return [*flags, *kept, *(word for word in hint if word not in flags)]


def _key(word: str) -> str:
    return word.strip("+~'\"").lstrip("-").partition("=")[0].replace("/", ".")


def _is_set(word: str, hint: list[str]) -> bool:
    """Whether a hint sets what the word sets, as `dataset.keep={}` does with `dataset.keep.output=x`."""
    return any(_key(word) == _key(one) or (one.endswith("={}") and _key(word).startswith(f"{_key(one)}.")) for one in hint)


def _is_misspelt(word: str, problem: Problem, hint: list[str]) -> bool:
    """Whether a problem about this word alone has a hint that says it otherwise: under another name, or by its parts."""
    if problem.what not in (word.lstrip("+").replace("\n", "\\n"), f"{_key(word)}={_value(word)}"):
        return False
    key = _key(word)
    known = key in ("run", *schema.GROUPS) or find_field(key)[0] is not None
    if key.startswith("trainer.extra."):
        known = key.removeprefix("trainer.extra.") in sft_config_options()
    return not known or any(_key(one).startswith(f"{key}.") or _repeats(one, [word]) for one in hint)


def _repeats(hint: str, argv: Iterable[str]) -> bool:
    """Whether a word of a hint has the value of one of the command line, which may be wrong in a second way."""
    return _value(hint) in map(_value, argv)


def _value(word: str) -> str:
    return word.partition("=")[2].strip("'\"").replace("\n", "\\n")


def problems_of(argv: Iterable[str], hardware: bool = True) -> list[Problem]:
    """What train.py refuses of a command line before anything is read; [] where it takes it."""
    try:
        check_command_line(ROOT / "conf", [word for word in argv if word != "train.py"], hardware)
    except Refusal as refusal:
        return refusal.problems
    return []


def type_hints(argv: Iterable[str], problems: list[Problem], check: Callable[[list[str]], list[Problem]]) -> None:
    """Type every hint of the problems of `argv` and demand that it mends its problem and is no problem itself.

    `check` gives the problems of a command line.
    """
    for problem in problems:
        for hint in hints_of(problem):
            command = typed(argv, problem, hint)
            left = check(command)
            assert problem not in left, f"the hint {hint} of {problem.what!r} mends nothing: {command}"
            new = [p for p in left if p not in problems]
            keys = [_key(word) for word in hint if not _repeats(word, argv)]
            own = [p for p in new if any(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", p.what) for key in keys)]
            assert not own, f"the hint {hint} of {problem.what!r} is refused itself: {own}"
