"""The project's own house: the shipped data, the settings table, the public keys, and what train.py imports."""

import json
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass

from scripts import settings_table
from sft.config.schema import DATASETS, Settings, field_docs
from tests.conftest import ROOT

# Promised to users and scripts (docs/settings.md); taking one away or renaming it is a change for CHANGELOG.md.
PROMISED = [
    *("model.name", "model.backend", "dataset.path", "dataset.name", "dataset.max_rows", "dataset.eval_fraction"),
    *("dataset.loss_on", "trainer.max_steps", "trainer.save_steps", "trainer.learning_rate", "lora.r", "seed"),
]


def all_fields(cls=Settings, prefix=""):
    for field in fields(cls):
        if is_dataclass(field.type):
            yield from all_fields(field.type, f"{prefix}{field.name}.")
        else:
            yield cls, field.name, prefix + field.name


def test_every_setting_is_documented():
    assert [key for cls, name, key in all_fields() if not field_docs(cls).get(name)] == []


def test_promised_keys_exist():
    assert set(PROMISED) <= {key for _, _, key in all_fields()}


def test_the_settings_table_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_table.make_page()


def test_the_shipped_data_is_whole():
    rows = [json.loads(line) for line in DATASETS["twists"].read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 240 and all(set(row) == {"instruction", "output"} for row in rows)
    assert all(row["instruction"].strip() and row["output"].strip() for row in rows)
    assert len({row["instruction"] for row in rows}) == len({row["output"] for row in rows}) == len(rows)
    chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in row["instruction"]) for row in rows)
    assert chinese * 2 == len(rows)


def test_help_and_errors_import_nothing_heavy():
    """torch, transformers and Unsloth cost seconds; a mistake or a question must not pay for them."""
    for arguments in (["--help"], ["lora.rr=8"], ["--cfg", "job"]):
        code = (
            "import sys, runpy\n"
            f"sys.argv = ['train.py', *{arguments!r}]\n"
            "try:\n    runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch', 'transformers', 'unsloth', 'trl', 'datasets', 'numpy'} & sys.modules.keys()\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)\n"
        )
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - start < 10  # 0.5 s on an idle machine; loose, because a busy one must not fail the test


def test_train_py_stays_short():
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 41


def test_a_fresh_clone_has_a_folder_for_runs_of_which_git_keeps_nothing_else():
    assert (ROOT / "outputs" / ".gitignore").read_text(encoding="utf-8").split() == ["*", "!.gitignore"]
