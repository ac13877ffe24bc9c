"""Installed packages against the tested set in setup.cfg. Imports none of them."""

import configparser
from importlib import metadata

from packaging.requirements import Requirement

from sft.paths import ROOT

SETUP = ROOT / "setup.cfg"

TOOLS = ("dev", "docs")
"""Extras that no run uses."""


def pinned(extras: bool = True) -> list[Requirement]:
    """What the project is tested with, from setup.cfg in a checkout, else from the installed package's metadata.

    The requirements of extras are among them, without the tools of development, unless `extras` is false.
    """
    if SETUP.is_file():
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(SETUP, encoding="utf-8")
        texts = parser["options"]["install_requires"].splitlines()
        for name, extra in parser["options.extras_require"].items():
            texts += extra.splitlines() if extras and name not in TOOLS else []
    else:
        try:
            left_out = TOOLS if extras else ("",)
            needed = [t for t in metadata.requires("sft-lora") or [] if not any(f'extra == "{tool}' in t for tool in left_out)]
            texts = [text.partition(";")[0] for text in needed]
        except metadata.PackageNotFoundError:
            texts = []
    return [Requirement(text) for text in texts if text.strip() and not text.lstrip().startswith("#")]


def differing(wanted: list[Requirement] | None = None) -> tuple[int, list[str]]:
    """(packages that are installed, those of them in another version as `torch 2.11.0 (tested: ==2.13.0)`)."""
    found, count = [], 0
    for requirement in pinned() if wanted is None else wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not wanted; without a needed package nothing would have come this far
        count += 1
        # A build's name behind the plus, such as +cu130, is no other version.
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            found.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    return count, found
