"""Write docs/benchmarks.md from benchmarks/results/*.json: the newest figure of each measurement, with its command.

python scripts/benchmarks_page.py            write it
python scripts/benchmarks_page.py --check    exit 1 if it is out of date
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TARGET = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks

The newest figure of each measurement. `benchmarks/README.md` says how to run each program, and `benchmarks/LOG.md` is the dated
diary with the circumstances. Machines were often shared with other work, so seconds are upper bounds.

Generated from `benchmarks/results/` by `python scripts/benchmarks_page.py`.
"""

COLUMNS = dict(what="what", figure="figure", peers="beside", command="command", hardware="hardware", commit="logged at")


def main(argv: list[str]) -> int:
    """Write the page, or with `--check` compare it; returns the exit code."""
    text = make_page()
    if "--check" in argv:
        same = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        if not same:
            print("docs/benchmarks.md is out of date: python scripts/benchmarks_page.py", file=sys.stderr)
        return 0 if same else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


def make_page() -> str:
    """The page: a table a file, in the order of their names."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n".join([HEAD, *(_section(json.loads(file.read_text(encoding="utf-8"))) for file in files)])


def _section(result: dict[str, Any]) -> str:
    head = [f"## {result['title']}", "", *([result["about"], ""] if result["about"] else [])]
    table = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    rows = [row | {"commit": f"`{row['commit']}`"} for row in result["rows"]]
    table += ["| " + " | ".join(row[key] for key in COLUMNS) + " |" for row in rows]
    return "\n".join([*head, *table]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
