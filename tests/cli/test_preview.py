"""scripts/preview.py: what a run would train on, shown before it is paid for."""

import os
import subprocess
from pathlib import Path

from tests import forked

COLUMNS = ("dataset.columns.instruction=question", "dataset.columns.output=answer")


def preview(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "40"}
    return forked.run("scripts/preview.py", *argv, cwd=folder, env=environment)


def test_the_learnt_part_stands_in_brackets(tmp_path):
    (tmp_path / "faq.csv").write_text(
        'question,answer\n什么是AI？,人工智能。😀\nhi,[bold]hello[/bold]\n"a, b",\n', encoding="utf-8"
    )
    done = preview(
        tmp_path,
        "dataset.path=faq.csv",
        *COLUMNS,
        "dataset.eval_fraction=0",
        "dataset.shuffle=false",
        "model.load_in_4bit=true",
    )
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>user\n什么是AI？<|im_end|>\n<|im_start|>assistant\n⟦人工智能。😀<|im_end|>⟧" in done.stdout
    assert "⟦[bold]hello[/bold]<|im_end|>⟧" in done.stdout, "cells are no mark-up"
    assert "2 rows to train on, 0 held out" in done.stdout and "template chat" in done.stdout
    assert "warning: 1 rows have an empty answer" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["faq.csv"], "no run folder"


def test_prompts_are_shown_with_what_the_reference_answer_earns(tmp_path):
    (tmp_path / "sums.csv").write_text("instruction,answer\nWhat is 1 + 1?,2\nWhat is 2 + 2?,4\n", encoding="utf-8")
    (tmp_path / "rewards.py").write_text("def short(completion, row):\n    return 0.5\n", encoding="utf-8")
    words = ("dataset.path=sums.csv", "dataset.eval_fraction=0", "dataset.shuffle=false", "method.reward_weights=[1,0.2]")
    done = preview(tmp_path, "method=grpo", *words, "method.reward_funcs=[number,'rewards.py:short']")
    assert done.returncode == 0, done.stderr
    assert "What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n\n\nReference answer: 2\n" in done.stdout
    assert "Row 2     number 1, short 0.5; with their weights 1.1\n" in done.stdout
    assert "completions have up to 256" in done.stdout and "target tokens" not in done.stdout.lower()


def test_string_templates_and_typed_line_breaks_are_shown_as_they_will_be(tmp_path):
    (tmp_path / "faq.csv").write_text("question,answer\nWhy?,Because.\nHow?,So.\n", encoding="utf-8")
    template = r'dataset.template="Q: {instruction}\nA:\n{output}"'
    done = preview(tmp_path, "dataset.path=faq.csv", *COLUMNS, template, "dataset.shuffle=false")
    assert done.returncode == 0, done.stderr
    assert "\nQ: Why?\nA:\n⟦Because.<|im_end|>⟧\n" in done.stdout and "1 rows to train on, 1 held out" in done.stdout


def test_refusals_leave_with_two_and_no_traceback(tmp_path):
    (tmp_path / "faq.csv").write_text("question,answer\na,b\nc\n", encoding="utf-8")
    for argv, words in (
        (("dataset.path=faq.csv", *COLUMNS), "faq.csv, line 3"),
        (("dataset.path=fax.csv",), "hint: dataset.path=faq.csv"),
        (("-m", "seed=1,2"), "leave -m out"),
    ):
        done = preview(tmp_path, *argv)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
