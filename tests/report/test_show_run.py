"""scripts/show_run.py: a picture of the curves and the answers as text, from whatever the run folder holds."""

import json

from sft.cli import show as show_run


def write(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_it_draws_the_curves_and_prints_the_answers(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"status": "stopped"}', encoding="utf-8")
    write(tmp_path, "metrics.jsonl", [{"step": s, "loss": 3 - s / 10, "learning_rate": 1e-4} for s in range(1, 9)])
    sample = {"index": 0, "source": "config", "prompt": "<s>Why?", "question": "Why?", "finish": "length"}
    answers = {0: "Because\nof", 4: "Since", 8: "Light \x1b[2J"}
    write(tmp_path, "samples.jsonl", [sample | {"step": step, "completion": text} for step, text in answers.items()])
    assert show_run.main([f"run={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "stopped" in said and "Why?" in said and "before   Because\n           of ..." in said
    assert "step 8   Light" in said and "Since" not in said and "\x1b" not in said
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_curves_and_answers_is_no_error(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"status": "running"}', encoding="utf-8")
    assert show_run.main([f"run={tmp_path}"]) == 0
    assert "no curves yet" in capsys.readouterr().out and not (tmp_path / "curves.png").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert show_run.main([f"run={tmp_path}/nothing"]) == 2
    assert "There is no such folder." in capsys.readouterr().err
    assert show_run.main(["lora.r=8"]) == 2
