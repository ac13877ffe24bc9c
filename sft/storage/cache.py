"""The user's cache folder of this project: what is made once and kept.

It is `SFT_CACHE`, else `$XDG_CACHE_HOME/sft`, else `~/.cache/sft`.
"""

import os
from collections.abc import Callable
from pathlib import Path

from sft.storage import atomic


def cache_dir() -> Path:
    """The user's cache folder of this project; created by whoever writes to it."""
    root = os.environ.get("SFT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft"
    return Path(root).expanduser()


def made_once(place: str, make: Callable[[Path], None], hashes: bool = False) -> Path:
    """The cached folder `name`; made beside its place and renamed, so that it is complete or absent.

    One with a file of another size than it was made with is made again. With `hashes` also one with other
    bytes; weights are not read for that, which takes seconds.
    """
    folder = cache_dir() / place
    if atomic.find_damage(folder, hashes):
        atomic.remove_folder(folder)
        with atomic.new_folder(folder, replace=False) as work:
            make(work)
    return folder
