"""sft init: a preset from a data file, which the three commands that it prints take as it stands."""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest

from sft.cli import init
from sft.cli.check import read_settings
from sft.cli.main import main
from sft.config.schema import TrainerSettings
from sft.errors import Refusal
from sft.paths import CONF
from sft.programs import VARIABLE
from tests import forked
from tests.conftest import ROOT

NUMBERS = range(12)
FILES = {
    "faq.csv": "question,answer\n" + "".join(f"How do I do {n}?,Press {n}.\n" for n in NUMBERS),
    "talk.jsonl": [
        {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"Hello {n}."}]} for n in NUMBERS
    ],
    "pairs.jsonl": [{"question": f"What is {n}?", "chosen": f"A number, {n}.", "rejected": "No idea."} for n in NUMBERS],
    "sums.jsonl": [{"prompt": f"What is {n} + 2?", "answer": str(n + 2)} for n in NUMBERS],
    "haiku.jsonl": [{"prompt": f"Write haiku {n}."} for n in NUMBERS],
    "towns.jsonl": [{"instruction": f"Which town is {n}?", "answer": f"Town {'ABC'[n % 3]}"} for n in NUMBERS],
    "rewards.py": "def letters(completion, row):\n    return sum(map(ord, completion)) % 17 / 17\n",
}


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch) -> Path:
    """A folder with data files alone, as the working folder; nobody sits at a terminal."""
    for name, content in FILES.items():
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


def settings_of(name: str):
    return read_settings(CONF, [f"experiment={name}"], hardware=False)


def fixes(*argv: str) -> list[str]:
    """The hints of a refused command."""
    with pytest.raises(Refusal) as refused:
        init.begin([*argv])
    return [problem.fix for problem in refused.value.problems]


def test_columns_and_the_goal_are_read_off_the_rows():
    for name in ("faq.csv", "talk.jsonl", "pairs.jsonl"):
        assert init.main([name, "model=tiny_random"]) == 0
    faq, talk, pairs = map(settings_of, ("faq", "talk", "pairs"))
    assert (faq.dataset.columns.instruction, faq.dataset.columns.output, faq.method.name.value) == ("question", "answer", "sft")
    assert (talk.dataset.template, talk.method.name.value, faq.dataset.template) == ("chat", "sft", "auto")
    assert (pairs.dataset.columns.prompt, pairs.method.name.value) == ("question", "dpo")
    assert pairs.trainer.learning_rate == 2e-4 and "learning_rate" not in Path("conf/experiment/pairs.yaml").read_text()
    assert {one.model.name for one in (faq, talk, pairs)} == {"tiny_random"}


@pytest.mark.parametrize(
    "file, rewards, weights",
    [
        ("sums.jsonl", ["number", "ends"], [0.8, 0.2]),
        ("towns.jsonl", ["contains", "ends"], [0.8, 0.2]),
        ("haiku.jsonl", ["length", "ends"], []),
    ],
)
def test_rewards_fit_the_reference_answers(file, rewards, weights):
    assert init.main([file, "goal=rewards", "name=x"]) == 0
    method = settings_of("x").method
    assert (method.name.value, method.reward_funcs, method.reward_weights) == ("grpo", rewards, weights)


def test_each_line_has_a_comment_and_further_words_are_written():
    words = [
        "model=owner/some-model",
        "lora=r32",
        "trainer.num_train_epochs=3",
        'dataset.system_prompt="Be \\${brief}: #1"',
        "seed=7",
    ]
    assert init.main(["faq.csv", *words]) == 0
    settings = settings_of("faq")
    assert (settings.model.name, settings.lora.r, settings.trainer.num_train_epochs) == ("owner/some-model", 32, 3)
    assert (settings.dataset.system_prompt, settings.seed) == ("Be ${brief}: #1", 7)
    lines = Path("conf/experiment/faq.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# @package _global_", "# python train.py experiment=faq"] and "12 rows of faq.csv" in lines[2]
    for number, line in enumerate(lines):
        if not line.endswith(":") and line.strip():
            assert "# " in line or lines[number - 1].strip().startswith("# "), line


def test_tables_lists_and_words_with_a_plus_are_written():
    words = ["samples={num_held_out: 2}", 'dataset.keep={answer: "Press"}', "+trainer.extra.neftune_noise_alpha=5"]
    words += ['samples.prompts=["Why?","a: b # {c}"]', "dataset.drop.input=x"]
    assert init.main(["faq.csv", *words[1:]]) == 2  # there is no column of that name to filter
    assert init.main(["faq.csv", *words[:3]]) == 0
    settings = settings_of("faq")
    assert settings.samples.num_held_out == 2 and settings.dataset.keep == {"answer": "Press"}
    assert settings.trainer.extra == {"neftune_noise_alpha": 5}
    assert init.main(["faq.csv", words[3], "name=x"]) == 0 and settings_of("x").samples.prompts == ["Why?", "a: b # {c}"]


def test_words_that_are_typed_with_a_command_are_no_part_of_a_preset():
    words = ["hydra.run.dir=x", "hydra/launcher=ray", "preflight.gpu=t4", "+team=small"]
    assert fixes("faq.csv", *words) == [f"leave {word.partition('=')[0]}= out" for word in words]


def test_a_file_that_is_there_is_written_anew_only_by_force():
    assert init.main(["faq.csv"]) == 0
    path = Path("conf/experiment/faq.yaml")
    path.write_text("mine", encoding="utf-8")
    assert fixes("faq.csv") == ["force=true   writes it anew\nname=faq_2"] and path.read_text() == "mine"
    assert init.main(["faq.csv", "name=faq_2"]) == 0
    assert init.main(["faq.csv", "force=true"]) == 0 and settings_of("faq").dataset.path == "faq.csv"


def test_all_words_that_cannot_be_used_are_refused_at_once(capsys):
    words = ["faq.csv", "goal=anwser", "lora.rr=3", "--name=x", "force=yes", "method=dop", "name=chat"]
    assert fixes(*words) == ["name=x", "goal=answer", "method=sft", "force=true", "name=my_chat", "lora.r=3"]
    assert init.main(words) == 2 and "Refused: 6 problems" in capsys.readouterr().err
    assert not Path("conf").exists()


def test_a_misspelt_file_a_column_or_a_model_is_refused_with_what_works():
    assert fixes("fqa.csv") == ["dataset.path=faq.csv"]
    assert fixes("lora.r=3") == ["data=faq.csv"]
    assert fixes("faq.csv", "dataset.columns.output=anwser") == [
        "dataset.columns.instruction=question dataset.columns.output=answer"
    ]
    assert fixes("faq.csv", "model=tiny_randon")[0].startswith("model=tiny_random\n")
    assert fixes("haiku.jsonl")[0].startswith("dataset.shape=text dataset.columns.text=<column>")
    assert init.main(["fqa.csv", "dataset.path=faq.csv"]) == 0  # as the hint is typed


def test_a_method_is_another_word_for_its_goal():
    assert init.main(["pairs.jsonl", "method=sft", "dataset.columns.output=chosen"]) == 0
    assert settings_of("pairs").method.name.value == "sft"
    assert init.main(["sums.jsonl", "method=grpo"]) == 0 and settings_of("sums").method.name.value == "grpo"
    assert fixes("sums.jsonl", "name=x", "method=grpo", "goal=chat") == ["goal=rewards"]
    assert fixes("sums.jsonl", "name=x", "experiment=chat", "dataset=twists") == ["leave experiment= out", "leave dataset= out"]


@pytest.mark.parametrize(
    "name, mended", [("2024", "my_2024"), ("null", "my_null"), ("a b", "a_b"), ("数据", "data"), ("none", "my_none")]
)
def test_a_name_that_hydra_would_not_find_is_refused_with_one_that_it_finds(name, mended):
    assert fixes("faq.csv", f"name={name}") == [f"name={mended}"]
    Path(f"{name}.csv").write_text(FILES["faq.csv"], encoding="utf-8")
    assert init.main([f"{name}.csv"]) == 0 and settings_of(mended).dataset.path == f"{name}.csv"


def test_whoever_sits_at_a_terminal_is_asked_for_model_and_goal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("tiny_random\nsongs\nrewards\n"))
    assert init.main(["sums.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "Which model?" in shown and "It is one of chat, answer" in shown
    assert settings_of("sums").method.name.value == "grpo" and settings_of("sums").model.name == "tiny_random"
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert init.main(["faq.csv"]) == 130 and not Path("conf/experiment/faq.yaml").exists()


def test_beside_a_conf_that_is_left_aside_the_commands_name_it(own, capsys):
    Path("conf").mkdir()
    Path("conf/config.yaml").write_text("a: 1\n", encoding="utf-8")
    assert init.main(["faq.csv"]) == 0
    assert "python train.py --config-dir conf experiment=faq" in capsys.readouterr().out
    assert read_settings(CONF, ["--config-dir", "conf", "experiment=faq"], hardware=False).dataset.path == "faq.csv"


def test_a_folder_that_takes_no_file_is_refused(own):
    Path("conf").write_text("a file", encoding="utf-8")
    assert fixes("faq.csv") == ["begin in a folder of your own: mkdir my_project && cd my_project"]


def test_the_commands_are_those_of_the_installed_program_where_it_was_typed(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "1")
    assert main(["init", "faq.csv"]) == 0
    shown = capsys.readouterr().out
    for command in ("sft preview experiment=faq", "sft preflight experiment=faq", "sft train experiment=faq"):
        assert f"\n  {command} " in shown
    assert main(["init", "--help"]) == 0 and "sft init my.csv" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["faq.csv"], ["talk.jsonl"], ["pairs.jsonl"], ["sums.jsonl", "goal=rewards", "method.reward_funcs=[rewards.py:letters]"]],
    ids=lambda words: words[0],
)
def test_the_three_commands_run_as_they_are_printed(own, words, capsys):
    quick = ["model=tiny_random", "tracking=none", "trainer.max_steps=2", "samples.num_held_out=0"]
    quick += ["method.max_completion_length=6", "method.num_generations=4"] if "goal=rewards" in words else []
    assert init.main([*words, *quick]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python ")]
    assert len(lines) == 3
    for command in (shlex.split(line.strip().partition("   ")[0]) for line in lines):
        done = forked.run(ROOT / command[1], *command[2:], cwd=own)
        assert done.returncode == 0, done.stderr
    [record] = own.glob("outputs/*/run.json")
    assert json.loads(record.read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.parametrize(
    ("rows", "epochs", "comment"), [(36, 1, "5 steps in all change little; 10 make about 50"), (36, 6, ""), (4000, 1, "")]
)
def test_a_small_file_comes_with_the_epochs_that_it_takes(rows, epochs, comment):
    found = init.few_steps(rows, TrainerSettings(num_train_epochs=epochs, effective_batch_size=8))
    assert (comment in found["trainer.num_train_epochs"]) if comment else found == {}
