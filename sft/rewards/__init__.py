"""Rewards of completions: those that ship with the project and functions of the user's own, loaded, called and checked."""

import functools
import inspect
import json
import math
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sft.config.own_code import line_of, own_function, run_file
from sft.config.reward_names import short_name
from sft.config.reward_rules import check_rewards
from sft.config.schema import MethodSettings
from sft.errors import Problem, Refusal, SftError, first_line
from sft.rewards.shipped import FUNCTIONS

NOT_GIVEN = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What TRL gives to a function with `completions`, and this project does not."""


class RewardFault(SftError):
    """A reward that raised, or gave no finite number; the message names it, its file and line, and the row."""


class RewardRow(dict):
    """What a reward is given besides the completion: the row's columns, `prompt`, `answer`, `finish` and `tokens`."""

    number: int = 0
    """The row's number in the data, from 1."""


def reward_row(entry: dict[str, Any], finish: str, tokens: int) -> RewardRow:
    """The row of a completion for its rewards. `entry` is a prepared row; `finish` is `ended` or `length`, `tokens` the
    completion's.
    """
    columns = json.loads(entry["columns"])
    own = {"prompt": entry["question"], "answer": entry["reference"], "finish": finish, "tokens": tokens}
    row = RewardRow({**columns, **own})
    row.number = entry["row"]
    return row


@dataclass(frozen=True)
class Reward:
    """One reward."""

    name: str
    """As charts call it."""
    weight: float
    function: Callable[..., Any]
    place: str = ""
    """The file and line of a function of the user's own; empty for a shipped one."""
    file: str = ""
    """Its file."""
    takes_lists: bool = False
    """Whether it takes all completions at once, as TRL's do."""

    def score(self, completions: list[str], rows: list[dict]) -> list[float]:
        """A finite number for each completion. Raises RewardFault for whatever else the function gives or raises."""
        if self.takes_lists:
            return self._score_lists(completions, rows)
        scores = []
        for completion, row in zip(completions, rows, strict=True):
            given = row.copy() if type(row) is dict else dict(row)  # a function that changes its row changes no other's
            try:
                value = self.function(completion, given)
            except Exception as error:
                raise self._fault(self._why(error), row, self._line_of(error)) from error
            scores.append(self._number(value, row))
        return scores

    def _score_lists(self, completions: list[str], rows: list[dict]) -> list[float]:
        if not rows:
            return []
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        given = {**columns, "prompts": columns.get("prompt", [""] * len(rows)), "completions": list(completions)}
        parameters = inspect.signature(self.function).parameters
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_POSITIONAL]
            if missing := [name for name in needed if name not in given]:
                why = f"it asks for {', '.join(missing)}; the data has {', '.join(sorted(given))}"
                raise self._fault(why, rows[0])
            given = {name: value for name, value in given.items() if name in parameters}
        try:
            values = self.function(**given)
        except Exception as error:
            raise self._fault(self._why(error), rows[0], self._line_of(error)) from error
        try:
            values = list(values)
        except TypeError:
            why = f"it gave {_shown(values)}, not a list of numbers"
            raise self._fault(why, rows[0]) from None
        if len(values) != len(completions):
            raise self._fault(f"it gave {len(values)} numbers for {len(completions)} completions", rows[0])
        return [self._number(value, row) for value, row in zip(values, rows, strict=True)]

    def _number(self, value: Any, row: dict) -> float:
        if not isinstance(value, numbers.Real | Decimal):
            raise self._fault(f"it gave {_shown(value)}, not a number", row)
        try:
            score = float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise self._fault(f"it gave {_shown(value)}, which is no finite number", row)
        return score

    def _fault(self, why: str, row: dict, place: str = "") -> RewardFault:
        place = place or self.place
        number = getattr(row, "number", 0)
        where = f" ({place})" if place else ""
        return RewardFault(f"the reward {self.name}{where}{f', row {number}' if number else ''}: {why}")

    def _why(self, error: Exception) -> str:
        return f"it raised {type(error).__name__}: {first_line(error)}"

    def _line_of(self, error: Exception) -> str:
        """The innermost line of the reward's own file that the error came through."""
        return line_of(error, self.file) or self.place


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} of type {type(value).__name__}" if value is not None else "None"


def load_rewards(method: MethodSettings) -> list[Reward]:
    """The rewards that `method.reward_funcs` names, in its order. The user's own files are run for it, each once.

    Raises Refusal, all at once, for what the rules find, files that raise, and functions of a form that is not known.
    """
    problems = check_rewards(method)
    if problems:
        raise Refusal(problems)
    weights = method.reward_weights or [1.0] * len(method.reward_funcs)
    modules: dict[Path, types.ModuleType | Problem] = {}
    rewards: list[Reward] = []
    for name, weight in zip(method.reward_funcs, weights, strict=True):
        own = own_function(name)
        if own is None:
            options = method.reward_options.get(name, {})
            rewards.append(Reward(name, weight, functools.partial(FUNCTIONS[name], **options)))
            continue
        file = own.file.resolve()
        if file not in modules:
            modules[file] = run_file(file, f"method.reward_funcs: {name}")
        module = modules[file]
        if isinstance(module, Problem):
            problems += [module] * (module not in problems)
            continue
        made = _own_reward(module, own.function, name, weight)
        if isinstance(made, Problem):
            problems.append(made)
        else:
            rewards.append(made)
    if problems:
        raise Refusal(problems)
    return rewards


def _own_reward(module: types.ModuleType, function: str, name: str, weight: float) -> Reward | Problem:
    """The reward of a function of a file, by the form of its parameters."""
    what, file = f"method.reward_funcs: {name}", str(module.__file__)
    found = getattr(module, function, None)
    if not callable(found):
        why = f"{function} is no function." if hasattr(module, function) else f"The file has no {function}."
        return Problem(what, why, f"write def {function}(completion, row): in {file}")
    code = getattr(inspect.unwrap(found), "__code__", None)
    place = f"{file}, line {code.co_firstlineno}" if code else file
    form = f"write def {function}(completion, row): ({place})"
    if inspect.iscoroutinefunction(found):
        return Problem(what, "It is async, and rewards are called one after another.", form)
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return Problem(what, "Its parameters cannot be read.", form)
    if "completions" in parameters:
        needed = [n for n, p in parameters.items() if n in NOT_GIVEN and p.default is p.empty]
        if needed:
            why = f"It asks for {', '.join(needed)}, which TRL gives and this project does not."
            return Problem(what, why, f"leave {needed[0]} out, or give it a default ({place})")
        return Reward(short_name(name), weight, found, place, file, takes_lists=True)
    try:
        inspect.signature(found).bind("", {})
    except TypeError:
        why = f"It takes ({', '.join(parameters)}); a reward takes a completion and its row, or TRL's lists (completions)."
        return Problem(what, why, form)
    return Reward(short_name(name), weight, found, place, file)
