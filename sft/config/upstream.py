"""Names that upstream packages accept, read without importing what is heavy."""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

NEED_MATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")
"""GGUF types that llama.cpp makes with an importance matrix alone, which nothing here computes."""

NOT_MADE = (*NEED_MATRIX, "nvfp4")
"""With those that llama.cpp reads and does not make."""


@functools.cache
def gguf_types() -> list[str]:
    """llama.cpp's file types that can be made, in small letters, read from the source of the package `gguf`, which would import
    numpy.
    """
    found = importlib.util.find_spec("gguf")
    source = Path(found.submodule_search_locations[0], "constants.py") if found else None
    if not source or not source.is_file():
        return []
    body = next(n.body for n in ast.parse(source.read_text("utf-8")).body if getattr(n, "name", "") == "LlamaFileType")
    names = [n.targets[0].id for n in body if isinstance(n, ast.Assign) and n.targets[0].id != "GUESSED"]
    types = [name.removeprefix("MOSTLY_").removeprefix("ALL_").lower() for name in names]
    return [name for name in types if name not in NOT_MADE]


@functools.cache
def enum_values(file: str, enum: str) -> list[str]:
    """Values of an enum in transformers, read from its source so that nothing heavy is imported."""
    found = importlib.util.find_spec("transformers")
    source = Path(found.submodule_search_locations[0], file) if found else None
    if not source or not source.is_file():
        return []
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = next((n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == enum), [])
    return [n.value.value for n in body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]


@functools.cache
def sft_config_options() -> set[str]:
    """Names of all fields of TRL's SFTConfig and transformers' TrainingArguments, read from their sources."""
    names = set()
    for package, file in (
        ("trl", "trainer/sft_config.py"),
        ("trl", "trainer/base_config.py"),
        ("transformers", "training_args.py"),
    ):
        found = importlib.util.find_spec(package)
        source = Path(found.submodule_search_locations[0], file) if found else None
        if source and source.is_file():
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name in ("SFTConfig", "_BaseConfig", "TrainingArguments"):
                    names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return names


@functools.cache
def lora_config_options() -> dict[str, ast.expr]:
    """Names of all fields of PEFT's LoraConfig with the type that each is declared as, read from its sources."""
    kinds: dict[str, ast.expr] = {}
    for package, file in (("peft", "config.py"), ("peft", "tuners/lora/config.py")):
        found = importlib.util.find_spec(package)
        source = Path(found.submodule_search_locations[0], file) if found else None
        if source and source.is_file():
            for node in ast.parse(source.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name in ("PeftConfigMixin", "PeftConfig", "LoraConfig"):
                    kinds |= {n.target.id: n.annotation for n in node.body if isinstance(n, ast.AnnAssign)}
    return kinds


def fits(value: Any, kind: ast.expr) -> bool:
    """Whether a plain value can be of a declared type; a class of upstream's own is made of a dictionary."""
    match kind:
        case ast.Constant():
            return value is kind.value
        case ast.BinOp():
            return fits(value, kind.left) or fits(value, kind.right)
        case ast.Subscript(value=ast.Name(id=outer)):
            parts = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
            if outer in ("Optional", "Union"):
                return (outer == "Optional" and value is None) or any(fits(value, part) for part in parts)
            if outer == "Literal":
                return value in [part.value for part in parts if isinstance(part, ast.Constant)]
            if outer == "dict":
                return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
            if outer == "tuple":
                return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(fits, value, parts))
            return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
        case ast.Name(id=name):
            known = {"bool": bool, "int": int, "float": int | float, "str": str, "list": list, "dict": dict}
            return isinstance(value, known.get(name, dict)) and (name == "bool" or not isinstance(value, bool))
    return True
