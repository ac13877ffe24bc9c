"""What the command line is refused for."""

import pytest

from sft.cli.check import check_command_line
from sft.errors import Problem, Refusal
from tests.conftest import ROOT
from tests.hints import problems_of, type_hints

CONF = ROOT / "conf"
SECRET = "hf_" + "aB3" * 10


def refusal_of(*argv: str, hardware: bool = True) -> Refusal:
    with pytest.raises(Refusal) as caught:
        check_command_line(CONF, list(argv), hardware)
    for problem in caught.value.problems:
        assert problem.what and "\n" not in problem.what
        assert len(problem.why.split()) > 2
        assert problem.fix, f"no hint: {problem}"
    type_hints(argv, caught.value.problems, lambda command: problems_of(command, hardware))
    return caught.value


def problem_of(*argv: str, hardware: bool = True) -> Problem:
    """The one problem of this command line."""
    (problem,) = refusal_of(*argv, hardware=hardware).problems
    return problem


def accepted(*argv: str) -> None:
    check_command_line(CONF, list(argv), hardware=False)
