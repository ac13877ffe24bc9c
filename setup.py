"""Puts conf/ into the package of a wheel, as sft/conf. All else about the package stands in setup.cfg."""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPresets(build_py):
    """A build that copies conf/; a checkout that is installed with -e has it already."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "sft", "conf")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("conf", target, ignore=_own_presets)


def _own_presets(folder: str, names: list[str]) -> list[str]:
    """Names in a folder of conf/ that git does not have: presets of somebody's own. None outside a checkout."""
    try:
        asked = ["git", "ls-files", "--error-unmatch", "conf/config.yaml"]  # else git's folder is another project's
        subprocess.run(asked, capture_output=True, check=True)
        asked = ["git", "ls-files", "--others", "--directory", "."]
        found = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [name for name in names if name in found.replace("/", "").split("\n")]


setup(cmdclass={"build_py": BuildWithPresets})
