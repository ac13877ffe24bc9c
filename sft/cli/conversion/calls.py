"""The calls of a notebook or of a Python script with their arguments, read by `ast`: nothing of it is run."""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.errors import first_line, refuse


class Unknown:
    """Stands for a value that is known only where the notebook runs."""


UNKNOWN = Unknown()

OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
}


@dataclass
class Call:
    """One call."""

    name: str
    """The function's own name: `from_pretrained`."""
    owner: str
    """What it was reached through: `FastLanguageModel`; empty for a plain function."""
    positional: list[Any]
    given: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    """The variable that takes what it returns, where that is one."""


@dataclass
class Source:
    """What was read."""

    calls: list[Call] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Texts that stand in the code."""
    unread: int = 0
    """Cells that are no Python."""


def read_calls(path: Path) -> Source:
    """The calls of a notebook's code cells, or of a script, in their order. Raises Refusal for a file that is neither."""
    found, variables = Source(), {}
    for text in _cells(path):
        if re.match(r"\s*%%(?!capture|time)", text):  # a cell in another language
            continue
        # Commands of the shell and of Jupyter, which may go on in the next line.
        plain = re.sub(r"^([ \t]*)[!%](?:.*\\\n)*.*", r"\1pass", text, flags=re.M)
        try:
            tree = ast.parse(plain)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            found.unread += 1
            continue
        for statement in tree.body:
            _read_statement(statement, found, variables)
    return found


def _cells(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".ipynb":
            return [text]
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"]) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refuse(
            f"from={path}", f"It cannot be read as a notebook: {first_line(error)}.", "save it as .ipynb again"
        ) from error


def _read_statement(statement: ast.stmt, found: Source, variables: dict[str, Any]) -> None:
    """Note the calls in a statement, then what it assigns."""
    target = ""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        target = statement.targets[0].id
    for node in _in_order(statement):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.texts.append(node.value)
        if isinstance(node, ast.Call):
            name, owner = _name_of(node.func)
            positional = [value_of(one, variables) for one in node.args]
            given = {keyword.arg: value_of(keyword.value, variables) for keyword in node.keywords if keyword.arg}
            found.calls.append(Call(name, owner, positional, given, target))
    if target:
        variables[target] = value_of(statement.value, variables)


def _in_order(node: ast.AST) -> list[ast.AST]:
    """A statement's nodes as they stand in the text, without what stands below `if False:`."""
    found, left = [], [node]
    while left:
        one = left.pop()
        found.append(one)
        never = isinstance(one, ast.If) and isinstance(one.test, ast.Constant) and not one.test.value
        left += one.orelse if never else ast.iter_child_nodes(one)
    return sorted(found, key=lambda one: (getattr(one, "lineno", 0), getattr(one, "col_offset", 0)))


def _name_of(function: ast.expr) -> tuple[str, str]:
    if isinstance(function, ast.Attribute):
        return function.attr, function.value.id if isinstance(function.value, ast.Name) else ""
    return getattr(function, "id", ""), ""


def value_of(node: ast.expr, variables: dict[str, Any]) -> Any:
    """The value of an expression of constants, lists, tables, sums and variables that hold such; else UNKNOWN."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return variables.get(node.id, UNKNOWN)
    if isinstance(node, ast.List | ast.Tuple):
        items = [value_of(one, variables) for one in node.elts]
        return UNKNOWN if UNKNOWN in items else items
    if isinstance(node, ast.Dict):
        pairs = [
            (value_of(k, variables) if k else UNKNOWN, value_of(v, variables))
            for k, v in zip(node.keys, node.values, strict=True)
        ]
        return UNKNOWN if any(UNKNOWN in pair or not isinstance(pair[0], str) for pair in pairs) else dict(pairs)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = value_of(node.operand, variables)
        return -value if isinstance(value, int | float) else UNKNOWN
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        both = [value_of(one, variables) for one in (node.left, node.right)]
        if all(isinstance(one, int | float) for one in both):
            try:
                return OPERATIONS[type(node.op)](*both)
            except (ArithmeticError, ValueError):
                return UNKNOWN
    return UNKNOWN
