"""Where this project's own files lie, and how a user's path is read."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

ROOT = PACKAGE.parent
"""The checkout, or the folder that the package is installed in."""

ASSETS = PACKAGE / "assets"

INSTALLED = (PACKAGE / "conf").is_dir()
"""Whether the package comes from a wheel, which has conf/ in it, and not from a checkout."""

CONF = (PACKAGE if INSTALLED else ROOT) / "conf"
"""The presets that come with the project."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """A user's path with `~` as the home; one of a user who is not known stays as it is, as in a shell.

    `Path.expanduser` raises a RuntimeError for such a path.
    """
    return Path(os.path.expanduser(path))
