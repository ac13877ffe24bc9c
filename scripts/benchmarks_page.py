"""Write docs/benchmarks.md from benchmarks/results/: the newest figure of each measurement, with its command, and the grids of
benchmarks/grid.py as tables and drawings.

python scripts/benchmarks_page.py            write it
python scripts/benchmarks_page.py --check    exit 1 if it is out of date
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import grid

RESULTS, TARGET = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks

The newest figure of each measurement. `benchmarks/README.md` says how to run each program, and `benchmarks/LOG.md` is the dated
diary with the circumstances. Machines were often shared with other work, so seconds are upper bounds.

Generated from `benchmarks/results/` by `python scripts/benchmarks_page.py`.
"""

GROWN = """\
Llama 3 8B's shape, compiled. What is not varied is 8 rows a step, rows of 190 tokens on average and rank 16. How many rows are
computed at once is left to `auto`; a peer computes its rows at once, without checkpointing, in bf16. A
range stands where measurements are more than a tenth apart. A peer's steps wait for the processor, which is quicker on some
hosts, so the ratios are to its best measurement."""

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
    for file in _grids():
        _drawing_of(file).write_text(grid.svg(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


def make_page() -> str:
    """The page: a table a file, in the order of their names, and a section a grid."""
    files = sorted(RESULTS.glob("*.json"))
    sections = [_section(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return "\n".join([HEAD, *sections, *map(_grown, _grids())])


def _grids() -> list[Path]:
    return sorted((RESULTS / "grids").glob("*.json"))


def _drawing_of(file: Path) -> Path:
    """The drawing of a grid's measurements; not checked, since its letters are laid out with the fonts of the machine."""
    return TARGET.parent / "images" / f"grid_{file.stem}.svg"


def _grown(file: Path) -> str:
    measured = json.loads(file.read_text(encoding="utf-8"))
    commands = ", ".join(f"`{command}`" for command in measured["commands"])
    counts = {len(runs) for ways in measured["results"].values() for points in ways.values() for runs in points.values()}
    rounds = "Each was measured once" if counts == {1} else f"Medians of {min(counts)} to {max(counts)} measurements"
    head = [f"## How speed grows: {measured['hardware']}", "", f"{GROWN} {rounds}, by {commands}.", ""]
    picture = f"![Tokens a second by rows, lengths and ranks](images/{_drawing_of(file).name})"
    return "\n".join([*head, picture, "", grid.tables(measured)])


def _section(result: dict[str, Any]) -> str:
    head = [f"## {result['title']}", "", *([result["about"], ""] if result["about"] else [])]
    table = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    rows = [row | {"commit": f"`{row['commit']}`"} for row in result["rows"]]
    table += ["| " + " | ".join(row[key] for key in COLUMNS) + " |" for row in rows]
    return "\n".join([*head, *table]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
