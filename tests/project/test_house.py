"""The house of sft/: imports run down and in no circle, and heavy or replaceable libraries stay where they belong."""

import ast
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests import house
from tests.conftest import ROOT


def imported(name: str) -> set[str]:
    """The names of the libraries that a module of `sft/` imports, anywhere in its text."""
    nodes = list(ast.walk(ast.parse(house.modules()[name].read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {full.split(".")[0] for full in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}}


@pytest.mark.skipif(not find_spec("importlinter"), reason='import-linter is not installed: pip install -e ".[dev]"')
def test_each_package_imports_only_from_floors_below_it():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


def test_no_modules_import_each_other_in_a_circle():
    arrows = house.imports(house.modules())
    assert len(arrows) > 100 and house.circles(arrows) == []
    arrows["sft.errors"] = {"sft.lifecycle"}
    assert any({"sft.errors", "sft.lifecycle"} <= set(circle) for circle in house.circles(arrows)), "a circle would be seen"


def test_settings_load_neither_torch_nor_transformers():
    modules = [name for name in house.modules() if name.split(".")[:2] == ["sft", "config"]]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "sys.exit(' '.join({'torch', 'transformers', 'trl', 'peft', 'datasets'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert len(modules) > 10 and done.returncode == 0, done.stderr


def test_a_run_knows_no_hydra():
    assert not {"hydra", "omegaconf"} & imported("sft.lifecycle")


def test_only_methods_import_trl():
    users = {name for name in house.modules() if "trl" in imported(name)}
    assert users and {".".join(name.split(".")[:2]) for name in users} == {"sft.methods"}


def test_paths_of_a_user_are_read_by_one_function():
    """`Path.expanduser` raises for `~somebody`; `paths.expanded` does not. The cache has to have a home, and raises."""
    sources = {name: path.read_text(encoding="utf-8") for name, path in house.modules().items()}
    assert {name for name, text in sources.items() if ".expanduser()" in text} == {"sft.storage.cache"}
