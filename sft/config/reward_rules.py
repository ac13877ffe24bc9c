"""Rules for the rewards of `method=grpo`: their names, weights and options, and files of the user's own, which are parsed here
and not run."""

import difflib
import math
import re
from typing import Any

from sft.config.keys import shown, typed
from sft.config.own_code import check_own, own_function
from sft.config.patterns import pattern_fault
from sft.config.reward_names import JSON_TYPES, NEEDED, SHIPPED, short_name
from sft.config.schema import MethodSettings
from sft.errors import Problem

OWN = "'method.reward_funcs=[rewards.py:polite]'"


def check_rewards(method: MethodSettings) -> list[Problem]:
    """What is wrong with `method.reward_funcs`, their weights and their options."""
    names = method.reward_funcs
    if not names:
        why = f"method=grpo learns from rewards, and none is named. Shipped are {', '.join(SHIPPED)}."
        fix = f"{typed('method.reward_funcs', ['number', 'ends'])}\n{OWN}   for example"
        return [Problem("method.reward_funcs=[]", why, fix)]
    problems = [problem for name in names for problem in _check_name(name, names)]
    short = [short_name(name) for name in names]
    for name in dict.fromkeys(one for one in short if short.count(one) > 1):
        why = f"{short.count(name)} rewards are called {name}: their curves could not be told apart."
        once = list(dict.fromkeys(names))
        fix = f"{typed('method.reward_funcs', once)} method.reward_weights=[]"
        fix = fix if len(once) < len(names) else "give the functions different names"
        problems.append(Problem(typed("method.reward_funcs", names), why, fix))
    return problems + _check_weights(method) + _check_options(method)


def _check_name(name: str, names: list[str]) -> list[Problem]:
    """What is wrong with the name of a shipped reward, or with the file and function that it names."""

    def instead(other: str) -> str:
        return typed("method.reward_funcs", [other if one == name else one for one in names])

    what = f"method.reward_funcs: {name}"
    own = own_function(name)
    if own:
        return check_own(own, what, "completion, row", instead)
    if name in SHIPPED:
        return []
    if ".py" in name or ":" in name or "/" in name:
        why = "A reward of your own is named by its file and its function."
        return [Problem(what, why, f"{OWN}   for example")]
    close = difflib.get_close_matches(name, SHIPPED, 1, 0.4)
    why = f"No such reward is shipped. There are {', '.join(SHIPPED)}, and functions of your own."
    return [Problem(what, why, instead(close[0]) if close else f"{OWN}   for example")]


def _check_weights(method: MethodSettings) -> list[Problem]:
    weights, names = method.reward_weights, method.reward_funcs
    if not weights:
        return []
    what = typed("method.reward_weights", weights)
    fix = f"{typed('method.reward_weights', [1] * len(names))}   or   method.reward_weights=[]"
    if len(weights) != len(names):
        why = f"There are {len(names)} rewards ({', '.join(map(short_name, names))}) and {len(weights)} weights."
        return [Problem(what, why, fix)]
    if not all(map(math.isfinite, weights)) or not any(weights):
        return [Problem(what, "They have to be finite numbers, not all of them 0.", fix)]
    return []


def _check_options(method: MethodSettings) -> list[Problem]:
    """Options of rewards that are not named, that a reward does not have or cannot do without, and of the wrong type."""
    problems, options = [], method.reward_options
    for name, given in options.items():
        what = f"method.reward_options.{name}={given}"
        if name not in method.reward_funcs:
            close = difflib.get_close_matches(name, [one for one in method.reward_funcs if one in SHIPPED], 1, 0.6)
            rest = {key: value for key, value in options.items() if key != name}
            others = {**rest, **({close[0]: given} if close and close[0] not in rest else {})}
            known = "It is a function of your own, whose options stand in its file." if own_function(name) else (
                f"method.reward_funcs does not have {name}, so it would be ignored.")  # fmt: skip
            problems.append(Problem(what, known, typed("method.reward_options", others)))
            continue
        if own_function(name):
            why = "The options of a function of your own stand in its file, as defaults of its parameters."
            problems.append(Problem(what, why, _without(name, options)))
            continue
        if not isinstance(given, dict):
            known = ", ".join(SHIPPED[name]) or "none"
            problems.append(Problem(what, f"It has to be a table of its options: {known}.", _without(name, options)))
            continue
        problems += _check_given(name, given, options)
    for name, option in NEEDED.items():
        if name in method.reward_funcs and isinstance(options.get(name, {}), dict) and option not in options.get(name, {}):
            why = f"The reward {name} needs its option {option}."
            example = {**options, name: {option: "^[0-9]+$"}}
            problems.append(Problem(f"method.reward_funcs: {name}", why, typed("method.reward_options", example)))
    return problems


def _check_given(name: str, given: dict[str, Any], options: dict[str, Any]) -> list[Problem]:
    problems, known = [], SHIPPED[name]
    if name == "json_schema" and given.keys() <= known.keys() and (fault := _schema_fault(given, "The schema")):
        example = {"type": "object", "required": ["name"]}
        return [Problem(f"method.reward_options.{name}={given}", fault, _with(name, example, options) + "   for example")]
    for option, value in given.items():
        what = f"method.reward_options.{name}.{option}={shown(value)}"
        rest = {key: one for key, one in given.items() if key != option}
        if option not in known:
            close = difflib.get_close_matches(option, known, 1, 0.4)
            better = {**rest, close[0]: value} if close and close[0] not in rest else rest
            why = f"The reward {name} has no such option. It has: {', '.join(known) or 'none'}."
            problems.append(Problem(what, why, _with(name, better, options)))
        elif not isinstance(value, known[option]) or isinstance(value, bool):
            kind = {str: "a text", int: "a whole number", list: "a list", dict: "a table"}[known[option]]
            problems.append(Problem(what, f"It has to be {kind}.", _with(name, rest, options)))
        elif known[option] is int and value < 1:
            problems.append(Problem(what, "It has to be at least 1.", _with(name, rest, options)))
        elif name == "regex" and (fault := pattern_fault(value)):
            fix = _with(name, {"pattern": re.escape(value)}, options) + "   for these very characters"
            problems.append(Problem(what, fault, fix))
        elif name == "contains" and not value.strip():
            problems.append(Problem(what, "A blank text stands in every completion.", _with(name, rest, options)))
    return problems


def _schema_fault(schema: Any, path: str) -> str:
    """What in a schema for `json_schema` is not known; empty if nothing is."""
    known = SHIPPED["json_schema"]
    if not isinstance(schema, dict):
        return f"{path} has to be a table."
    for key, value in schema.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1, 0.5)
            return f"{path} has {key!r}; what is known is {', '.join(known)}." + f" Did you mean {close[0]}?" * bool(close)
        if not isinstance(value, known[key]):
            return f"{path}.{key} has the wrong type."
        if key == "type" and value not in JSON_TYPES:
            return f"{path}.type={value} is none of {', '.join(JSON_TYPES)}."
        if key == "required" and not all(isinstance(one, str) for one in value):
            return f"{path}.required has to be a list of names."
    parts = {f"{path}.{name}": part for name, part in schema.get("properties", {}).items()}
    parts |= {f"{path}.items": schema["items"]} if "items" in schema else {}
    return next((fault for inner, part in parts.items() if (fault := _schema_fault(part, inner))), "")


def _with(name: str, given: dict[str, Any], options: dict[str, Any]) -> str:
    """The override that gives a reward these options."""
    return typed("method.reward_options", {**options, name: given}) if given else _without(name, options)


def _without(name: str, options: dict[str, Any]) -> str:
    return typed("method.reward_options", {key: value for key, value in options.items() if key != name})
