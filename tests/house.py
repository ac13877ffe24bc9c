"""The house in numbers: files, lines and import circles of `sft/` by package. `python tests/house.py`; exit 1 on a circle.

Imports inside functions count. The floors themselves are a contract in setup.cfg, which `lint-imports` checks.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules() -> dict[str, Path]:
    """Every module of `sft/` by its dotted name."""
    found = {}
    for path in sorted((ROOT / "sft").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(paths: dict[str, Path]) -> dict[str, set[str]]:
    """The modules of `sft/` that each one imports, anywhere in its text."""
    arrows = defaultdict(set)
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [full if full in paths else node.module for full in wanted]
            arrows[name] |= {module for module in wanted if module in paths} - {name}
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, by whatever way, each other one."""

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            for module in arrows[left.pop()] - seen:
                seen.add(module)
                left.append(module)
        return seen

    ways = {module: reached(module) for module in list(arrows)}
    groups = {tuple(sorted(b for b in ways[a] if a in ways[b])) for a in ways if a in ways[a]}
    return [list(group) for group in sorted(groups)]


def main() -> int:
    """Print the table and the circles."""
    paths = modules()
    arrows = imports(paths)
    rows = defaultdict(lambda: [0, 0])
    for name, path in paths.items():
        package = name.split(".")[1] if path.parent != ROOT / "sft" else "(top)"
        rows[package][0] += 1
        rows[package][1] += len(path.read_text(encoding="utf-8").splitlines())
    for package, (files, lines) in sorted(rows.items()):
        print(f"{package:12} {files:4} files {lines:6} lines")
    found = circles(arrows)
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    print(f"{'sft':12} {total[0]:4} files {total[1]:6} lines   {sum(map(len, arrows.values()))} imports, {len(found)} circles")
    for circle in found:
        print("circle:", " ".join(circle))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
