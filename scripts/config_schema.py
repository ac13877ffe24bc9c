"""Write conf/schema.json from sft/config/schema.py: a JSON schema of the files in conf/, for editors.

python scripts/config_schema.py            write it
python scripts/config_schema.py --check    exit 1 if it is out of date
"""

import json
import sys
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.config import schema

TARGET = ROOT / "conf" / "schema.json"

FILLED_IN = {"type": "string", "pattern": r"\$\{.+\}"}
"""A value that Hydra fills in, which may stand for one of any type."""

BY_HYDRA = {
    "defaults": {"type": "array", "description": "Files that come before or after this one; see Hydra's defaults list."},
    "hydra": {"type": "object", "description": "Hydra's own settings: folders, sweeper, launcher."},
}
"""What a file may have beside settings; `hydra` only where it is about all groups."""

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def main(argv: list[str]) -> int:
    """Write the schema, or with `--check` compare it; returns the exit code."""
    text = json.dumps(make_schema(), indent=1, ensure_ascii=False) + "\n"
    if "--check" in argv:
        same = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        if not same:
            print("conf/schema.json is out of date: python scripts/config_schema.py", file=sys.stderr)
        return 0 if same else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


def make_schema() -> dict[str, Any]:
    """The schema: a file holds settings of one group, or of all, which is `global` in `$defs`."""
    groups = {field.name: field.type for field in fields(schema.Settings) if is_dataclass(field.type)}
    forms = {"global": _table(schema.Settings, BY_HYDRA)}
    forms |= {name: _table(cls, {"defaults": BY_HYDRA["defaults"]}) for name, cls in groups.items() if name in schema.GROUPS}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Presets of sft",
        "description": "Generated from sft/config/schema.py by python scripts/config_schema.py; do not edit.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in forms],
        "$defs": forms,
    }


def _table(cls: type, further: dict[str, Any] | None = None) -> dict[str, Any]:
    """A settings class, whose keys are these and no others."""
    docs, known = schema.field_docs(cls), {}
    for field in fields(cls):
        if is_dataclass(field.type):
            known[field.name] = _table(field.type)
        else:
            known[field.name] = {"description": docs[field.name], "default": _default(field), **_value(field.type)}
    about = " ".join((cls.__doc__ or "").split())
    return {"type": "object", "description": about, "properties": known | (further or {}), "additionalProperties": False}


def _value(kind: Any) -> dict[str, Any]:
    """What a setting of this type may be, or a text that Hydra fills in."""
    if kind is Any:  # a text or several
        return {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "string"}}]}
    forms = _forms(kind)
    if any(form.get("type") == "string" and "enum" not in form for form in forms):
        return forms[0] if len(forms) == 1 else {"type": [form["type"] for form in forms]}
    return {"anyOf": [*forms, FILLED_IN]}


def _forms(kind: Any) -> list[dict[str, Any]]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is list:
        return [{"type": "array", "items": _value(inner[0])}]
    if origin is dict:
        return [
            {"type": "object"} if inner[1] is Any else {"type": "object", "additionalProperties": {"type": ["string", "null"]}}
        ]
    if origin is Union or type(kind).__name__ == "UnionType":
        return [form for each in inner for form in _forms(each)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [{"enum": [member.value for member in kind]}]
    return [{"type": PLAIN[kind]}]


def _default(field: Any) -> Any:
    value = field.default if field.default is not MISSING else field.default_factory()
    return getattr(value, "value", value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
