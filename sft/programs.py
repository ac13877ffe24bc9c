"""What the user calls this project's programs: `python train.py` in a checkout, `sft train` where that was typed."""

import os
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

from sft.paths import INSTALLED

VARIABLE = "SFT_TYPED"
"""Set by the command `sft` for itself and for what it starts."""

WORDS = {"show_run": "show", "install_gguf": "install-gguf"}
"""Scripts that the command has another word for."""


OTHERS = re.compile(r"\b(hf|wandb|swanlab|trackio|mlflow|tensorboard)(?= (?:auth|login|sync|leet|show|ui|--logdir)\b)")
"""Programs that came with this project's packages, where a hint has them typed."""


def by_name() -> bool:
    """Whether the user typed `sft`."""
    return bool(os.environ.get(VARIABLE))


def as_called(text: str) -> str:
    """A text with commands in it, written as this user types them."""
    if INSTALLED:
        text = re.sub(r'pip install -e "?\.((?:\[\w+\])?)"?', r'pip install "sft-lora\1"', text)
        text = re.sub(r"(?<!uv )\bpip install\b", lambda _: _typed_installer(), text)
        text = OTHERS.sub(lambda match: shlex.quote(_found(match[1])), text)
    if not by_name():
        return text
    text = re.sub(r"(?:python )?scripts/(\w+)\.py", lambda match: f"sft {WORDS.get(match[1], match[1])}", text)
    text = re.sub(r"torchrun ((?:--\S+ \S+ )*)train\.py", r"torchrun \1-m sft train", text)
    return text.replace("python train.py", "sft train")


def installer() -> list[str]:
    """The command, up to its `install`, that puts packages beside this project: this environment's pip, else uv or pip of
    the shell, for what `uv tool` and `pipx` made may have none of its own.
    """
    if any(metadata.distributions(name="pip")):  # setuptools patches what looks for the module itself
        return [sys.executable, "-P", "-m", "pip", "install"]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    return ["pip", "--python", sys.executable, "install"]


def _typed_installer() -> str:
    """`pip install` where the shell's pip is this environment's, else the whole command."""
    ours = Path(shutil.which("pip") or "").parent == Path(sys.executable).parent
    return "pip install" if ours else shlex.join(installer())


def _found(program: str) -> str:
    """A program's name where the shell finds it, else its path beside this Python if it is there."""
    beside = Path(sys.executable).parent / program
    return str(beside) if not shutil.which(program) and beside.is_file() else program
