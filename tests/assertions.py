"""Prints how many assertions the tests hold, so that a change to them can be seen to drop none: python -m tests.assertions"""

import ast
from pathlib import Path

CALLS = {"raises", "warns"}
"""Of pytest: each is an assertion of its own."""


def count(code: str) -> int:
    """`assert` statements, `pytest.raises` and `pytest.warns` in a file's source."""
    nodes = list(ast.walk(ast.parse(code)))
    called = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    expected = [func for func in called if func.attr in CALLS and getattr(func.value, "id", "") == "pytest"]
    return sum(isinstance(node, ast.Assert) for node in nodes) + len(expected)


if __name__ == "__main__":
    print(sum(count(file.read_text(encoding="utf-8")) for file in Path(__file__).parent.rglob("test_*.py")))
