"""Where this project's own files lie."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

ROOT = PACKAGE.parent
"""The checkout, or the folder that the package is installed in."""

ASSETS = PACKAGE / "assets"

INSTALLED = (PACKAGE / "conf").is_dir()
"""Whether the package comes from a wheel, which has conf/ in it, and not from a checkout."""

CONF = (PACKAGE if INSTALLED else ROOT) / "conf"
"""The presets that come with the project."""
