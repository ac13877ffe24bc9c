"""What a check of a run finds, one line each: ok, a warning or a refusal, with its fix."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sft.data.token_cache import Prepared
from sft.errors import Problem, Refusal
from sft.plan.plan import Plan
from sft.programs import as_called

OK, WARNING, REFUSED = "ok", "warning", "refused"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    part: str
    state: str
    """`ok`, `warning` or `refused`."""
    text: str
    fix: str = ""
    """The override or command that mends it."""


@dataclass
class Found:
    """What a check of a run gives."""

    tokenizer: Any = None
    stop_ids: set[int] = field(default_factory=set)
    prepared: Prepared | None = None
    plan: Plan = field(default_factory=Plan)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """Tokens of each row, by split."""
    lines: list[Finding] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What goes to preflight.json besides the data's facts."""

    def ok(self, part: str, text: str) -> None:
        """Add a line that needs nothing."""
        self.lines.append(Finding(part, OK, text))

    def warn(self, part: str, text: str, fix: str = "") -> None:
        """Add a warning."""
        self.lines.append(Finding(part, WARNING, text, as_called(fix)))

    def refuse(self, part: str, problems: list[Problem]) -> None:
        """Add problems that keep the run from starting."""
        self.problems += problems
        self.lines += [Finding(part, REFUSED, f"{p.what}\n{p.why}", p.fix) for p in problems]

    @contextlib.contextmanager
    def collecting(self, part: str) -> Iterator[None]:
        """Note a Refusal in the block and go on after it."""
        try:
            yield
        except Refusal as refusal:
            self.refuse(part, refusal.problems)

    @property
    def warnings(self) -> list[str]:
        """The warnings as sentences with their fix."""
        joined = ((line.text, " or: ".join(line.fix.splitlines())) for line in self.lines if line.state == WARNING)
        return [f"{text} ({fix})" if fix else text for text, fix in joined]
