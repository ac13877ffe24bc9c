"""Functions of the user's own, named `file.py:function`: what a text names, whether it is there, and the file run.

The rules parse a file and do not run it. It is run once the settings are good.
"""

import ast
import difflib
import hashlib
import re
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft.errors import Problem, first_line
from sft.paths import expanded


@dataclass(frozen=True)
class OwnFunction:
    """A function of the user's own: `file.py:function`."""

    file: Path
    function: str


def own_function(text: str) -> OwnFunction | None:
    """What `file.py:function` names; None for a text of another form. A relative file is that of the working directory."""
    found = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", text, re.S)
    return OwnFunction(expanded(found[1]), found[2]) if found else None


def contents_hash(file: Path) -> str | None:
    """Hash of a file's contents; None where it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def check_own(own: OwnFunction, what: str, parameters: str, instead: Callable[[str], str]) -> list[Problem]:
    """What is wrong with a file of the user's own and the function in it; its text is parsed, nothing is run.

    `what` is the setting, `parameters` those that its functions take, and `instead` gives the override with another function.
    """
    if not own.file.is_file():
        folder = own.file.parent if own.file.parent.is_dir() else Path()
        close = difflib.get_close_matches(own.file.name, [file.name for file in folder.glob("*.py")], 1)
        fix = instead(f"{folder / close[0]}:{own.function}") if close else f"looked in {folder.resolve()}"
        return [Problem(what, "There is no such file.", fix)]
    try:
        tree = ast.parse(own.file.read_bytes())
    except SyntaxError as error:
        where = f"{own.file}, line {error.lineno}"
        return [Problem(what, f"It is no Python: {error.msg} ({where}).", f"mend {where}")]
    except (OSError, ValueError) as error:
        return [Problem(what, f"It cannot be read: {error}.", f"mend or replace {own.file}")]
    names, unknown = _names_of(tree)
    if own.function in names or unknown:
        return []
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    close = difflib.get_close_matches(own.function, functions, 1, 0.4)
    why = f"The file has no such function. It has: {', '.join(functions) or 'none'}."
    return [Problem(what, why, instead(f"{own.file}:{close[0]}") if close else f"write def {own.function}({parameters}):")]


def _names_of(tree: ast.Module) -> tuple[set[str], bool]:
    """The names that a module binds, and whether there may be others: by `from x import *`."""
    nodes = list(ast.walk(tree))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    return names | {alias.asname or alias.name for alias in imported}, any(alias.name == "*" for alias in imported)


def run_file(file: Path, what: str) -> types.ModuleType | Problem:
    """The module of a file, run anew from its text; a file beside it can be imported by it. `what` is the setting."""
    module = types.ModuleType(f"sft_own_{file.stem}")
    module.__file__ = str(file)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        where = line_of(error, str(file)) or str(file)
        why = f"Its file cannot be run: {type(error).__name__}: {first_line(error)} ({where})."
        return Problem(what, why, f"mend {where}")
    return module


def line_of(error: BaseException, file: str) -> str:
    """The innermost line of the user's file that an error came through; empty where it came through none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}, line {frames[-1].lineno}" if frames else ""
