"""Write docs/settings.md from sft/config/schema.py, and the options of each group from conf/.

python scripts/settings_table.py            write it
python scripts/settings_table.py --check    exit 1 if it is out of date
"""

import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.config import schema

TARGET = ROOT / "docs" / "settings.md"


def main(argv: list[str]) -> int:
    """Write the page, or with `--check` compare it; returns the exit code."""
    page = make_page()
    if "--check" in argv:
        same = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page
        if not same:
            print("docs/settings.md is out of date: python scripts/settings_table.py", file=sys.stderr)
        return 0 if same else 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


def make_page() -> str:
    """The whole page as Markdown: one table a settings class, then the options of each group."""
    lines = [
        "# All settings",
        "",
        "Generated from `sft/config/schema.py` by `python scripts/settings_table.py`; do not edit.",
        "A setting is changed by `python train.py KEY=VALUE`. Options of a group may bring other values than these defaults.",
    ]
    lines += _tables(schema.Settings, "", "General")
    lines += ["", "## Options of the groups", "", "| command | what it is |", "|---|---|"]
    for group in schema.GROUPS:
        for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
            comments = [line[2:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            about = [c for c in comments if not c.startswith(("python ", "@package"))]
            lines.append(f"| `{group}={file.stem}` | {_escape(' '.join(about))} |")
    return "\n".join(lines) + "\n"


def _tables(cls: type, prefix: str, title: str) -> list[str]:
    docs, nested = schema.field_docs(cls), []
    rows = []
    for field in fields(cls):
        if is_dataclass(field.type):
            nested += _tables(field.type, f"{prefix}{field.name}.", f"{prefix}{field.name}")
        else:
            rows.append(f"| `{prefix}{field.name}` | {_type(field.type)} | {_default(field)} | {_escape(docs[field.name])} |")
    about = " ".join((cls.__doc__ or "").split())
    table = ["", f"## {title}", "", about]
    if rows:
        table += ["", "| setting | type | default | meaning |", "|---|---|---|---|", *rows]
    return table + nested


def _type(kind: Any) -> str:
    if kind is Any:  # a text or several, which OmegaConf has no type for
        return "`str`, `list[str]`, `null`"
    parts = getattr(kind, "__args__", (kind,))
    members = [name for part in parts for name in getattr(part, "__members__", ())]
    if members:
        return " \\| ".join(f"`{name}`" for name in members) + (", `null`" if len(parts) > 1 else "")
    name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return f"`{name.replace('typing.', '')}`".replace(" | None", "`, `null").replace("|", "\\|")


def _default(field: Any) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()
    value = getattr(value, "value", value)
    if isinstance(value, list):
        value = "[" + ", ".join(map(str, value)) + "]"
    if isinstance(value, (bool, type(None))):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
