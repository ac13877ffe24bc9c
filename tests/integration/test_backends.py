"""Both backends train on the same tokens, from the same weights, to the same losses. Unsloth in a process of its own."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import SMALL, in_one_process

needs_unsloth = pytest.mark.skipif(not importlib.util.find_spec("unsloth"), reason="Unsloth is not installed")
JOBS = {
    "tiny": (*SMALL, "dataset=ruozhiba", "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2",
             "dataset.name=twists", "trainer.max_steps=6", "lora.lora_dropout=0.1"),
    "smollm2": ("trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1", "trainer.max_steps=4",
                "trainer.eval_steps=4", "trainer.save_steps=4", "tracking=none", "dataset.max_rows=8",
                "samples.num_held_out=0"),
}  # fmt: skip


def words_of(name: str, backend: str, place: Path) -> list[str]:
    return [*JOBS[name], f"model.backend={backend}", f"hydra.run.dir={place / name / backend}"]


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where Unsloth has trained each job, in one process as in a sweep; it changes the libraries where they are imported."""
    folder = tmp_path_factory.mktemp("backends")
    commands = [words_of(name, "unsloth", folder) for name in JOBS]
    done = subprocess.run(in_one_process(commands), capture_output=True, text=True, cwd=folder, timeout=280)
    assert done.stdout.count("code 0\n") == len(JOBS), done.stderr[-3000:]
    return folder


@needs_unsloth
@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_backends_give_the_same_losses(place, name):
    done = forked.run("train.py", *words_of(name, "transformers", place), cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = {b: losses(place / name / b) for b in ("transformers", "unsloth")}
    assert ours["transformers"].keys() == ours["unsloth"].keys() and len(ours["unsloth"]) >= 4
    assert all(abs(ours["transformers"][step] - ours["unsloth"][step]) < 1e-3 for step in ours["unsloth"])
    facts = [json.loads((place / name / b / "preflight.json").read_text(encoding="utf-8")) for b in ours]
    rows = [
        key for key in facts[0] if key not in ("settings", "checks", "memory", "plan", "decided", "disk")
    ]  # by backend and hour
    assert len(rows) > 20 and [facts[0][key] for key in rows] == [facts[1][key] for key in rows]
    assert json.loads((place / name / "unsloth" / "run.json").read_text(encoding="utf-8"))["model"]["backend"] == "unsloth"
