"""The project's own house: the shipped data, the settings table, the public keys, and what train.py imports."""

import json
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass

import jsonschema
import pytest
import yaml
from omegaconf._utils import get_yaml_loader

from scripts import benchmarks_page, config_schema, settings_table
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


def test_the_page_of_benchmarks_is_up_to_date():
    assert benchmarks_page.main(["--check"]) == 0


def test_the_settings_table_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_table.make_page()


def problems_by_schema(text: str, form: str = "") -> list[str]:
    """What the JSON schema finds in a file of conf/, as an editor shows it; `form` is the one that it has to have."""
    whole = json.loads(config_schema.TARGET.read_text(encoding="utf-8"))
    part = {"$ref": f"#/$defs/{form}", "$defs": whole["$defs"]} if form else whole
    values = yaml.load(text, Loader=get_yaml_loader()) or {}
    return [error.message for error in jsonschema.Draft7Validator(part).iter_errors(values)]


def test_the_json_schema_of_presets_is_up_to_date():
    assert config_schema.main(["--check"]) == 0


def test_the_json_schema_takes_every_preset():
    for file in [*(ROOT / "conf").glob("*.yaml"), *(ROOT / "conf").glob("*/*.yaml")]:
        text = file.read_text(encoding="utf-8")
        form = "global" if "# @package _global_" in text or file.parent.name == "conf" else file.parent.name
        assert problems_by_schema(text, form) == problems_by_schema(text) == [], file


@pytest.mark.parametrize(
    "text, form",
    [
        ("path: a.csv\nshap: pairs\n", "dataset"),
        ("path: {a: b}\n", "dataset"),
        ("r: eight\n", "lora"),
        ("overlong: keep\n", "dataset"),
        ("trainer: {learning_rates: 1}\n", "global"),
        ("keep: {a: [b]}\n", "dataset"),
    ],
    ids=lambda text: text.strip(),
)
def test_the_json_schema_shows_a_misspelt_key_and_a_wrong_type(text, form):
    assert problems_by_schema(text, form) and problems_by_schema(text)


@pytest.mark.parametrize(
    "text, form",
    [
        ("path: [a.csv, b.csv]\nmax_rows: null\nshape: auto\n", "dataset"),
        ("r: ${oc.env:RANK,8}\ntarget_modules: [q_proj]\nextra: {use_x: true}\n", "lora"),
        ("defaults:\n  - override /lora: r8\nhydra: {mode: MULTIRUN}\ntrainer: {learning_rate: 1e-4}\n", "global"),
        ("num_processes: 2\n", "distributed"),
        ("num_processes: auto\n", "distributed"),
    ],
    ids=["dataset", "lora", "global", "number", "auto"],
)
def test_the_json_schema_takes_what_hydra_takes(text, form):
    assert problems_by_schema(text, form) == problems_by_schema(text) == []


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
