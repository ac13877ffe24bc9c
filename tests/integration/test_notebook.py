"""The notebooks: made from one source, without outputs, and run from top to bottom as they stand on a machine without a GPU."""

import base64
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import make_notebook
from sft.cli.check import read_settings
from tests.conftest import ROOT

COPIED = ("conf", "hydra_plugins", "scripts", "sft", "train.py", "setup.cfg")


def read(name: str) -> dict:
    return json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", make_notebook.LANGUAGES)
def test_the_notebooks_are_what_the_script_makes(language):
    name = make_notebook.LANGUAGES[language]
    assert (ROOT / "notebooks" / name).read_text(encoding="utf-8") == make_notebook.make_notebook(language)
    for cell in read(name)["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[dev]'")
    nbformat.validate(nbformat.reads(json.dumps(read(name)), as_version=4))


def test_both_languages_have_the_same_code():
    """All but the title over each cell, so that running one of them is enough."""
    english, chinese = (
        [cell["source"][1:] for cell in read(name)["cells"] if cell["cell_type"] == "code"]
        for name in make_notebook.LANGUAGES.values()
    )
    assert english == chinese and len(english) > 8


def test_what_it_would_type_in_colab_with_a_gpu(tmp_path, monkeypatch):
    """Every cell run in order, with the machine and the shell acted: the Drive, the install, the commands, the token."""
    pytest.importorskip("IPython", reason="IPython is not installed: pip install -e '.[dev]'")
    from IPython.core.inputtransformer2 import TransformerManager
    from IPython.utils.text import DollarFormatter

    typed, mounted, cells = [], [], {}

    def system(line: str) -> None:
        typed.append(DollarFormatter().format(line, **cells))
        cells["_exit_code"] = 0
        if typed[-1].startswith("git clone"):
            (tmp_path / "sft-lora").mkdir()

    drive = SimpleNamespace(mount=mounted.append)
    secrets = SimpleNamespace(get=lambda name: f"the secret {name}")
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=drive, userdata=secrets))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr("IPython.display.display", lambda _: None)
    monkeypatch.setattr("IPython.display.Image", lambda _: None)
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **how: "<p>" if self.name == "report.html" else read_text(self, **how))
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)

    cells["get_ipython"] = lambda: SimpleNamespace(system=system)
    sources = ["".join(cell["source"]) for cell in read("colab.ipynb")["cells"] if cell["cell_type"] == "code"]
    filled_in = {'HUB = ""': 'HUB = "me/my-model"', 'PROJECT = ""': 'PROJECT = "https://example.org/sft"'}
    for number, source in enumerate(sources):
        if number == 2:
            with pytest.raises(AssertionError, match="Write the git address"):
                exec(TransformerManager().transform_cell(source), cells | {"PROJECT": ""})
        for old, new in filled_in.items() if number == 0 else ():
            source = source.replace(old, new)
        exec(TransformerManager().transform_cell(source), cells)

    assert mounted == ["/content/drive"] and os.environ["HF_TOKEN"] == "the secret HF_TOKEN"
    assert os.environ["WANDB_API_KEY"] == "the secret WANDB_API_KEY"
    assert not any("secret" in line for line in typed)
    python, run = "/content/env/bin/python", "/content/drive/MyDrive/sft/first"
    trained = f"{python} train.py model=llama3_8b dataset=ruozhiba trainer.max_steps=60 trainer.save_steps=15"
    assert sum(line.startswith(trained) and line.split()[-1] == f"hydra.run.dir={run}" for line in typed) == 2  # and again
    assert f"{python} scripts/export.py run={run} export=gguf export.gguf.quantizations=[q4_k_m]" in typed
    assert any("torch.cuda.is_available()" in line for line in typed) and f"{python} scripts/install_gguf.py" in typed
    assert f"{python} scripts/export.py run={run} push=true export.hub.repo=me/my-model" in typed
    assert f'uv pip install --quiet --python {python} --editable ".[unsloth]"' in typed
    for line in typed:
        program, *words = shlex.split(line)[1:]
        if program == "train.py":
            assert read_settings(ROOT / "conf", [w for w in words if not w.startswith("hydra.")], hardware=False)


FORKED = f"""
import os, shlex, sys
sys.path.insert(0, {str(ROOT)!r})
from tests import forked

def system(line, shell=get_ipython().system):
    words = shlex.split(get_ipython().var_expand(line, depth=1))
    if words[0] != sys.executable or "preflight.mode=only" in words:
        return shell(" ".join(words))
    done = forked.run(os.path.abspath(words[1]), *words[2:], cwd=os.getcwd())
    print(done.stdout, done.stderr)
    get_ipython().user_ns["_exit_code"] = done.returncode

get_ipython().system = system
"""
"""Before the first cell: the first command that takes a model's libraries goes to the shell, the others are forked."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """In a copy of the project, because its runs go to outputs/. The test's last lines say what a reader must see."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[dev]'")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[dev]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e '.[dev]'")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    place = {"metadata": {"path": tmp_path / "notebooks"}}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=240, resources=place)
    started = tmp_path / "ipython" / "profile_default" / "startup"
    started.mkdir(parents=True)
    (started / "forked.py").write_text(FORKED, encoding="utf-8")
    client.execute(env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    if folder := os.environ.get("SFT_KEEP_NOTEBOOK"):  # to look at it
        nbformat.write(notebook, f"{folder}/colab.ipynb")

    said = {
        cell["source"].splitlines()[0].lstrip("# "): output_text(cell) for cell in notebook.cells if cell.cell_type == "code"
    }
    assert "0 refused; nothing was trained." in said["Check"]
    assert said["Train"].rstrip().endswith("stopped") and "Resume from step 1" not in said["Train"]
    assert said["Go on"].rstrip().endswith("finished") and "Resume from step 1" in said["Go on"]
    assert "step 4" in said["Show"] and "before" in said["Show"]
    rows = [json.loads(line) for line in (tmp_path / "outputs/first/samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["question"] in said["Show"] for row in rows)
    shown = [o["data"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    (picture,) = [data["image/png"] for data in shown if "image/png" in data]
    (page,) = [data["text/html"] for data in shown if "text/html" in data]
    assert page.startswith("<div><iframe srcdoc=") and "Held-out loss" in page
    width, height = struct.unpack(">II", base64.b64decode(picture)[16:24])
    assert width > 800 and height > 200
    assert "ok" in said["Export"] and "adapter_model.safetensors" in said["Export"]
    assert "without a GPU" in said["Push"]
    assert json.loads((tmp_path / "outputs/first/run.json").read_text(encoding="utf-8"))["status"] == "finished"


def output_text(cell: dict) -> str:
    return "".join(output.get("text", "") for output in cell["outputs"])
