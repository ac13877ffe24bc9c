"""Puts conf/ into the package of a wheel, as sft/conf. All else about the package stands in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPresets(build_py):
    """A build that copies conf/; a checkout that is installed with -e has it already."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("conf", Path(self.build_lib, "sft", "conf"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithPresets})
