"""Both backends train on the same tokens, from the same weights, to the same losses. Each in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import ROOT, SMALL

needs_unsloth = pytest.mark.skipif(not importlib.util.find_spec("unsloth"), reason="Unsloth is not installed")
JOB = ("dataset=ruozhiba", "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2")


def losses(folder: Path, *overrides: str) -> dict[int, float]:
    words = [*overrides, f"hydra.run.dir={folder}"]
    if "model.backend=unsloth" in words:  # which changes the libraries where they are imported
        command = [sys.executable, str(ROOT / "train.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, timeout=280)
    else:
        done = forked.run("train.py", *words, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def compare(tmp_path: Path, *overrides: str) -> None:
    ours = {b: losses(tmp_path / b, *overrides, f"model.backend={b}") for b in ("transformers", "unsloth")}
    assert ours["transformers"].keys() == ours["unsloth"].keys() and len(ours["unsloth"]) >= 4
    assert all(abs(ours["transformers"][step] - ours["unsloth"][step]) < 1e-3 for step in ours["unsloth"])
    facts = [json.loads((tmp_path / b / "preflight.json").read_text(encoding="utf-8")) for b in ours]
    rows = [
        key for key in facts[0] if key not in ("settings", "checks", "memory", "plan", "decided", "disk")
    ]  # by backend and hour
    assert len(rows) > 20 and [facts[0][key] for key in rows] == [facts[1][key] for key in rows]
    assert json.loads((tmp_path / "unsloth" / "run.json").read_text(encoding="utf-8"))["model"]["backend"] == "unsloth"


@needs_unsloth
def test_backends_give_the_same_losses_on_the_tiny_model(tmp_path):
    compare(tmp_path, *SMALL, *JOB, "dataset.name=twists", "trainer.max_steps=6", "lora.lora_dropout=0.1")


@needs_unsloth
@pytest.mark.slow
def test_backends_give_the_same_losses_on_smollm2(tmp_path):
    one_row = ("trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1", "trainer.max_steps=4")
    rows = ("tracking=none", "dataset.max_rows=8", "samples.num_held_out=0", "trainer.eval_steps=4", "trainer.save_steps=4")
    compare(tmp_path, *one_row, *rows)
