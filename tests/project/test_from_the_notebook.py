"""The table that leads from the Unsloth notebook to the command line: every override in it has to work as it is written."""

import re
import shlex

import pytest

from scripts import make_notebook
from sft.cli.check import read_settings
from tests.conftest import ROOT, make_settings

PROGRAMS = ("python", "pip")


def overrides(language: str) -> list[list[str]]:
    """The overrides of each row of the table, as the shell splits them."""
    table = make_notebook.read_table(ROOT / "docs" / make_notebook.TABLES[language])
    spans = [re.findall(r"`([^`]+)`", line.split(" | ")[-1]) for line in table.splitlines()[2:]]
    return [[w for span in row if "=" in span and not span.startswith(PROGRAMS) for w in shlex.split(span)] for row in spans]


@pytest.mark.parametrize("language", make_notebook.TABLES)
def test_every_override_of_the_table_is_taken(language, tmp_path, monkeypatch):
    """As if each row were typed on a machine with a GPU, in a folder with a file of one's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("faq.json", "val.json"):
        (tmp_path / name).write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    rows = overrides(language)
    assert sum(map(bool, rows)) > 25
    lines: list[dict[str, str]] = []  # few commands with many overrides: each takes a second
    for key, _, value in (word.partition("=") for row in rows for word in row if not word.startswith("hydra.")):
        if key == "dataset" or all(key in line for line in lines):
            lines.append({})  # what follows belongs to this data set
        next(line for line in reversed(lines) if key not in line)[key] = value
    for line in lines:
        assert read_settings(ROOT / "conf", [f"{key}={value}" for key, value in line.items()], hardware=False)


def test_both_languages_name_the_same_settings():
    english, chinese = ([[word.partition("=")[0] for word in row] for row in overrides(lang)] for lang in ("en", "zh"))
    assert english == chinese


def test_the_choices_of_the_notebook_exist():
    form = next(cell for cell in make_notebook.CELLS if isinstance(cell, make_notebook.Code)).source
    for group, variable in (("model", "MODEL"), ("dataset", "DATASET"), ("export", "EXPORT")):
        choices = re.findall(r'"(\w+)"', re.search(rf"^{variable} = .*\[(.*)\]", form, re.MULTILINE)[1])
        files = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
        assert choices and set(choices) <= files
    more = re.search(r'^MORE = "(.*?)"', form, re.MULTILINE)[1]
    settings = make_settings("model=llama3_8b", "dataset=ruozhiba", *more.split())
    assert settings.trainer.max_steps == 60 and settings.trainer.save_steps == 15
