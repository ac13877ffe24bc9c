"""Columns of small files, refused with the settings: before a library is imported."""

from pathlib import Path

import pytest

from sft.cli.check import check_command_line
from sft.data import prepare
from tests.config.refused import CONF, refusal_of

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.mark.parametrize(
    ("method", "columns", "fix"),
    [
        ("sft", ("question", "answer"), "dataset.columns.instruction=question dataset.columns.output=answer"),
        ("dpo", ("question", "good"), "chosen"),
        ("grpo", ("title", "year"), "dataset.columns"),
    ],
)
def test_columns_of_a_small_file_are_refused_before_a_library_is_imported(method, columns, fix):
    Path("faq.csv").write_text(f"{','.join(columns)}\n" + "a b,c d\n" * 20, encoding="utf-8")
    words = [f"method={method}", *["method.reward_funcs=[ends]"] * (method == "grpo")]
    problem = refusal_of(*words, "dataset=local", "dataset.path=faq.csv").problems[0]
    assert fix in problem.fix


def test_a_file_is_left_to_the_run_where_it_is_large_or_read_by_ones_own_function(monkeypatch):
    Path("faq.csv").write_text("question,answer\na,b\n", encoding="utf-8")
    Path("my.py").write_text(
        "def row(row):\n    return {'instruction': row['question'], 'output': row['answer']}\n", encoding="utf-8"
    )
    words = ["dataset=local", "dataset.path=faq.csv"]
    check_command_line(CONF, [*words, "dataset.format=my.py:row"])
    check_command_line(CONF, [*words, "dataset.columns.instruction=question", "dataset.columns.output=answer"])
    monkeypatch.setattr(prepare, "SMALL", 5)
    check_command_line(CONF, words)
