"""The one exception tree of the project, and the form in which a refusal is shown to the user."""

from dataclasses import dataclass

from sft.programs import as_called
from sft.sanitize import shown, without_passwords


class SftError(Exception):
    """Base of every error this project raises on purpose."""


class SaveFailed(SftError):
    """A checkpoint or the weights could not be written; what was written before is whole."""


@dataclass(frozen=True)
class Problem:
    """One thing the user has to change before a run can start."""

    what: str
    """What was set or found, as the user wrote it: `lora.rr=8`, `data.csv, line 7`."""
    why: str
    """Why it cannot work, in a sentence."""
    fix: str = ""
    """The override or command that mends it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fix", as_called(self.fix))


class Refusal(SftError):
    """The run is refused before training: every problem found, in one message. Exit code 2."""

    def __init__(self, problems: list[Problem]):
        self.problems = list(problems)
        super().__init__(format_problems(self.problems))


class ModelFault(SftError):
    """The model itself cannot be trained: its loss before the first step is no finite number."""


class HubError(SftError):
    """A push to the hub failed; everything made is still on disk. The message is one line and never holds a token."""


class ExportError(SftError):
    """An export could not be made or measured; the trained weights are untouched. The message is one line."""


def format_problems(problems: list[Problem]) -> str:
    """Lay problems out one under the other: what was set, why it cannot work, and a `hint:` line with the fix.

    The text is safe to print: control characters that came with a file's name or a row are shown as such.
    """
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"Refused: {count}; nothing was trained."]
    for number, problem in enumerate(problems, 1):
        lines += ["", f"  {number}. {problem.what}", *(f"     {line}" for line in problem.why.splitlines())]
        if problem.fix:
            lines += [f"     hint: {line}" for line in problem.fix.splitlines()]
    return without_passwords(shown("\n".join(lines)))


def refuse(what: str, why: str, fix: str = "") -> Refusal:
    """A refusal with a single problem, for `raise refuse(...)`."""
    return Refusal([Problem(what, why, fix)])


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, outermost first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def is_page(error: BaseException) -> bool:
    """Whether a page came in place of the hub's answer, as a proxy or a login sends one: no JSON, or no header of the hub's."""
    return any("Expecting value" in str(e) or "X-Repo-Commit" in str(e) for e in chain_of(error))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; without the password of an address in it."""
    return (without_passwords(str(error)).strip() or type(error).__name__).splitlines()[0][:300]


def last_line(error: BaseException) -> str:
    """The last line of an error's message, in the same way."""
    return (without_passwords(str(error)).strip() or type(error).__name__).splitlines()[-1][:300]


class RankLost(RuntimeError):
    """Another rank of the run is gone. The message says which, and why as far as it could tell."""
