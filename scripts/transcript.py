"""Write docs/transcript.md: a first run of the installed command in a folder without a checkout, as a terminal shows it.

    python scripts/transcript.py

Builds the wheel, installs it into a folder of its own beside the packages of this environment, and runs the commands. A test
does the same and compares what they print, but for numbers.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.programs import VARIABLE

TARGET = ROOT / "docs" / "transcript.md"

ROWS = """\
instruction,output
How do I reset my password?,"Open Settings, choose Account, then Reset password."
Where are my invoices?,"Under Billing, then History."
Can I pay by bank transfer?,"Yes, for yearly plans."
How do I add a colleague?,"Open Team and press Invite."
Can I change my user name?,"Yes, under Account, once a month."
How do I cancel my plan?,"Under Billing, press Cancel plan."
"""

COMMANDS = (
    "cat faq.csv",
    "sft init faq.csv model=tiny_random",
    "sft train experiment=faq trainer.max_steps=3 tracking=none hydra.run.dir=outputs/first",
    "sft export run=outputs/first export=merged_16bit",
    "ls outputs/first",
)

HEAD = """\
# A first run in the terminal

What an installed `sft` prints, in an empty folder with six rows of one's own. The model is `tiny_random`, which learns nothing
and takes seconds: for a real one leave `model=tiny_random` and `trainer.max_steps=3` out.

Made by `python scripts/transcript.py`; a test runs the same commands.
"""


def main() -> int:
    """Write the page; returns the exit code."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "mine"
        folder.mkdir()
        text = make_page(folder, install(Path(place)))
    TARGET.write_text(text, encoding="utf-8")
    return 0


def install(folder: Path) -> dict[str, str]:
    """Build the wheel and install it into `folder`/site, as pip does it; returns an environment in which `sft` is that one."""
    source = folder / "source"
    source.mkdir()
    for name in ("sft", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", VARIABLE)}
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "wheels"), str(source)]
    subprocess.run(build, cwd=folder, env=plain, check=True, capture_output=True, timeout=120)
    [wheel] = (folder / "wheels").iterdir()
    place = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", place, wheel], env=plain, check=True, timeout=120)
    shutil.rmtree(source)
    return plain | {"PYTHONPATH": str(place), "PATH": f"{place / 'bin'}{os.pathsep}{plain['PATH']}"}


def make_page(folder: Path, environment: dict[str, str]) -> str:
    """The page: each command in `folder` with what it prints. Raises CalledProcessError for one that fails."""
    (folder / "faq.csv").write_text(ROWS, encoding="utf-8")
    return (
        "\n".join([HEAD, "```", *(line for command in COMMANDS for line in _typed(command, folder, environment))][:-1])
        + "\n```\n"
    )


def _typed(command: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=environment, text=True, timeout=280, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield f"$ {command}"
    for line in done.stdout.splitlines():  # without bars, which a terminal overwrites
        if line.strip() and not re.search(r"\d+%\|| it/s|\x1b|^\s*warning: |^\[INFO\]", line):
            yield line.rstrip()
    yield ""


def without_numbers(page: str) -> list[str]:
    """The lines of a page with each number as `#`: two machines round apart."""
    return re.sub(r"[+-]?\d[\d.,]*", "#", page).splitlines()


if __name__ == "__main__":
    sys.exit(main())
