"""Where this project's own files lie."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

ROOT = PACKAGE.parent
"""The checkout, or the folder that the package is installed in."""

ASSETS = PACKAGE / "assets"
