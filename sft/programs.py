"""What the user calls this project's programs: `python train.py` in a checkout, `sft train` where that was typed."""

import os
import re

from sft.paths import INSTALLED

VARIABLE = "SFT_TYPED"
"""Set by the command `sft` for itself and for what it starts."""

WORDS = {"show_run": "show", "install_gguf": "install-gguf"}
"""Scripts that the command has another word for."""


def by_name() -> bool:
    """Whether the user typed `sft`."""
    return bool(os.environ.get(VARIABLE))


def as_called(text: str) -> str:
    """A text with commands in it, written as this user types them."""
    if INSTALLED:
        text = re.sub(r'pip install -e "?\.((?:\[\w+\])?)"?', r'pip install "sft-lora\1"', text)
    if not by_name():
        return text
    text = re.sub(r"(?:python )?scripts/(\w+)\.py", lambda match: f"sft {WORDS.get(match[1], match[1])}", text)
    text = re.sub(r"torchrun ((?:--\S+ \S+ )*)train\.py", r"torchrun \1-m sft train", text)
    return text.replace("python train.py", "sft train")
