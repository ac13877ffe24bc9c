"""What the project uses of other packages that they do not promise: found in its source by `ast`.

Five kinds of names: private ones (`torch._foreach_mul`, `getattr(config, "_commit_hash")`, `self._tr_loss` in a subclass),
methods that a subclass overrides (`SFTTrainer.training_step`), what is assigned to on a module or class of theirs, methods of
their objects that a function takes the place of (`layer.update = write`), and files of theirs that are read as text.
"""

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OWN = ("sft", "hydra_plugins", "scripts", "tests", "train")
"""Packages of the project. Of `hydra_plugins`, which plugins share, only the modules that are here."""
PROMISED = {"_replace", "_asdict", "_fields", "_make"}
"""Names with an underscore that Python documents."""


class Use(NamedTuple):
    """One use: the name and where it stands. Of an attribute of some object it is `._tr_loss`, of a file `/constants.py`."""

    name: str
    file: str
    line: int


def sources(root: Path = ROOT) -> list[Path]:
    """The files of the program, wherever in its folders they lie."""
    folders = (root / "sft", root / "hydra_plugins", root / "scripts", root / "benchmarks")
    return [root / "train.py", *sorted(file for folder in folders if folder.is_dir() for file in folder.rglob("*.py"))]


def uses(files: list[Path], factories: dict[str, str], root: Path = ROOT) -> list[Use]:
    """All uses in `files`. `factories` names the base of a class whose own `class` line does not: it is a parameter there.

    Raises LookupError for a class whose base nobody names.
    """
    modules = [_Module(file, root) for file in files]
    classes = {node.name: (module, node) for module in modules for node in ast.walk(module.tree) if _is_class(node)}
    bases = {name: _upstream_base(*found, classes, factories) for name, found in classes.items()}
    own = {name for _, node in classes.values() for name in _own_members(node, bases[node.name])}
    return [use for module in modules for use in _Scan(module, bases, own).uses()]


class _Module:
    """A parsed file, with what its imports call things."""

    def __init__(self, file: Path, root: Path):
        self.tree, self.path = ast.parse(file.read_text(encoding="utf-8")), file.relative_to(root).as_posix()
        self.root, self.names, self.imports = root, {}, []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
                    self.imports.append((alias.name, node.lineno))
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    self.imports.append((f"{node.module}.{alias.name}", node.lineno))

    def dotted(self, node: ast.AST) -> str | None:
        """`torch.ops.aten` for an expression that is an imported name and attributes of it."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.names:
            return None
        return ".".join([self.names[node.id], *reversed(parts)])

    def is_upstream(self, name: str) -> bool:
        """Whether a dotted name is another package's, and not the standard library's."""
        first, second = (*name.split("."), "")[:2]
        if first == "hydra_plugins":
            return not (self.root / first / f"{second}.py").is_file()
        return first not in OWN and first not in sys.stdlib_module_names


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in PROMISED and name != "_"


def _upstream_base(module: _Module, node: ast.ClassDef, classes: dict, factories: dict[str, str]) -> str | None:
    """The dotted name of the class of another package that `node` is a subclass of, perhaps through one of ours."""
    if node.name in factories:
        return factories[node.name]
    for base in node.bases:
        name = module.dotted(base)
        if name and module.is_upstream(name):
            return name
        last = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        if last in classes and classes[last][1] is not node:
            return _upstream_base(*classes[last], classes, factories)
        if name is None and not hasattr(builtins, last):
            raise LookupError(
                f"{module.path}:{node.lineno}: the base of class {node.name} is a parameter. Name it in FACTORIES."
            )
    return None


def _members(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Methods and attributes that a class body defines."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child.name, child.lineno
        for target in getattr(child, "targets", [getattr(child, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id, child.lineno


def _own_members(node: ast.ClassDef, base: str | None) -> Iterator[str]:
    """What a class of ours has that no class of theirs gave it."""
    for name, _ in _members(node):
        if not base or not hasattr(resolve(base), name):
            yield name
    for part in ast.walk(node) if not base else ():
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and getattr(part.value, "id", "") == "self":
            yield part.attr


class _Scan:
    """Walks through one file."""

    def __init__(self, module: _Module, bases: dict[str, str | None], own: set[str]):
        self.module, self.bases, self.own = module, bases, own
        nodes = list(ast.walk(module.tree))
        self.inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
        """Expressions of which an attribute is taken: the whole of it is looked at, not its parts."""
        self.functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        self.reads_sources = any(getattr(node, "attr", "") == "submodule_search_locations" for node in nodes)

    def uses(self) -> Iterator[Use]:
        for name, line in self.module.imports:
            if self.module.is_upstream(name) and any(map(_is_private, name.split("."))):
                yield Use(name, self.module.path, line)
        yield from self._walk(self.module.tree, None)

    def _walk(self, node: ast.AST, base: str | None) -> Iterator[Use]:
        """Uses below `node`; `base` is what the class around it is a subclass of."""
        if _is_class(node):
            base = self.bases[node.name]
            for name, line in _members(node) if base else ():
                if not name.endswith("__") and hasattr(resolve(base), name):
                    yield Use(f"{base}.{name}", self.module.path, line)
        yield from (Use(name, self.module.path, node.lineno) for name in self._names_at(node, base))
        for child in ast.iter_child_nodes(node):
            yield from self._walk(child, base)

    def _names_at(self, node: ast.AST, base: str | None) -> Iterator[str]:
        if isinstance(node, ast.Attribute):
            yield from self._attribute(node, base)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
            if _is_private(str(name)) and name not in self.own:
                yield f".{name}"
        elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "__dict__":
            if isinstance(node.slice, ast.Constant) and _is_private(str(node.slice.value)):
                yield f".{node.slice.value}"
        elif isinstance(node, ast.Assign):
            yield from self._replaced(node)
        elif isinstance(node, ast.Constant) and self.reads_sources and re.fullmatch(r"[\w/]+\.py", str(node.value)):
            yield f"/{node.value}"

    def _attribute(self, node: ast.Attribute, base: str | None) -> Iterator[str]:
        dotted = self.module.dotted(node)
        if dotted:
            private = any(map(_is_private, dotted.split("."))) and id(node) not in self.inner
            if self.module.is_upstream(dotted) and (private or isinstance(node.ctx, ast.Store)):
                yield dotted
        elif _is_private(node.attr):
            is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if (is_super and base) or node.attr not in self.own:
                yield f".{node.attr}"

    def _replaced(self, node: ast.Assign) -> Iterator[str]:
        """Attributes that a function is assigned to, of objects that are not ours."""
        target, value = node.targets[0], node.value
        several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        for place, what in zip(target.elts, value.elts, strict=True) if several else ((target, value),):
            made = isinstance(what, ast.Lambda) or getattr(what, "id", "") in self.functions
            made |= isinstance(what, ast.Call) and getattr(what.func, "attr", "") in ("partial", "MethodType")
            if made and isinstance(place, ast.Attribute) and not (self.module.dotted(place) or _is_private(place.attr)):
                yield f".{place.attr}"  # a private one is found as such


def resolve(name: str) -> Any:
    """The object of a dotted name; raises ImportError or AttributeError if it is not there."""
    parts = name.split(".")
    found, parts = importlib.import_module(parts[0]), parts[1:]
    place = [found.__name__]
    for part in parts:
        place.append(part)
        # A module that Hydra has loaded as a plugin is no attribute of its package.
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(place))
    return found
