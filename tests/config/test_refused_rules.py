"""Settings that do not go together, files, templates and limits that are refused before anything heavy is imported."""

import os

import pytest

from sft.config import extra_rules, upstream
from tests.config.refused import SECRET, accepted, problem_of, refusal_of

pytestmark = pytest.mark.usefixtures("no_gpu")


# ---------------------------------------------------------------------------------------- rules between settings


@pytest.mark.parametrize(
    ("argv", "what", "fix"),
    [
        (["model.load_in_4bit=true"], "model.load_in_4bit=true", "model.load_in_4bit=false"),
        (["trainer.optim=adamw_8bit"], "trainer.optim=adamw_8bit", "trainer.optim=adamw_torch"),
        (["model.dtype=float16"], "model.dtype=float16", "model.dtype=auto"),
        (["model.attn_implementation=flash_attention_2"], "flash_attention_2", "model.attn_implementation=sdpa"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(argv, what, fix):
    problem = problem_of(*argv)
    assert what in problem.what and "GPU" in problem.why and problem.fix == fix
    accepted(*argv)


@pytest.mark.parametrize(
    ("argv", "what", "fix"),
    [
        (["model.load_in_4bit=true", "model.load_in_8bit=true"], "model.load_in_8bit=true", "model.load_in_8bit=false"),
        (["lora=none", "lora.r=8"], "lora=none lora.r=8", "lora=default"),
        (["lora=none", "model.load_in_4bit=true"], "lora=none model.load_in_4bit=true", "lora=default"),
        (["model.dtype=float16", "lora=none"], "model.dtype=float16 lora=none", "model.dtype=auto"),
        (["lora.target_modules=[]"], "lora.target_modules=[]", "[all-linear]"),
        (["trainer.early_stopping_patience=2", "dataset.eval_fraction=0"], "stopping_patience=2", "dataset.eval_fraction=0.1"),
        (["trainer.early_stopping_threshold=0.1"], "early_stopping_threshold=0.1", "trainer.early_stopping_patience=3"),
        (["dataset.eval_split=test", "dataset.eval_fraction=0"], "dataset.eval_split=test", "dataset.eval_split=null"),
        (["dataset.name=a/b", "dataset.eval_split=test"], "dataset.eval_split=test", "dataset.eval_fraction=0"),
        (["dataset=local"], "dataset.path=null", "dataset.path=my_data.jsonl"),
        (["dataset.keep={output: \"(\"}"], "dataset.keep.output=(", r"""'dataset.keep.output="\("'"""),
        (["model.name=banana"], "model.name=banana", "model.name="),
        (["trainer.optim=adam"], "trainer.optim=adam", "trainer.optim=adam"),
        (["trainer.optim=zzz"], "trainer.optim=zzz", "trainer.optim=adamw_torch"),
        (["trainer.lr_scheduler_type=cos"], "trainer.lr_scheduler_type=cos", "trainer.lr_scheduler_type=cosine"),
        (["dataset.columns.input=instruction"], "dataset.columns.input=instruction", "dataset.columns.input=null"),
        (["dataset.columns.output=instruction"], "dataset.columns.output=instruction", "dataset.columns.instruction="),
        (["dataset.columns.completion=prompt"], "dataset.columns.completion=prompt", "dataset.columns.prompt="),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(argv, what, fix):
    problem = problem_of(*argv, hardware=False)
    assert what in problem.what and fix in problem.fix


def test_columns_may_be_shared_by_roles_of_different_shapes():
    accepted("dataset.columns.prompt=instruction", "dataset.columns.completion=output", "dataset.columns.text=output")
    accepted("dataset=ruozhiba")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learning_rate", "a setting of its own"),
        ("output_dir", "Another setting decides"),
        ("max_length", "Another setting decides"),
        ("packing", "no effect"),
        ("eos_token", "no effect"),
        ("neftune_noise_alfa", "Did you mean neftune_noise_alpha?"),
        ("banana", "no such option"),
    ],
)
def test_extra_options_are_checked_by_name(name, words):
    assert words in problem_of(f"trainer.extra.{name}=5").why
    accepted("trainer.extra.neftune_noise_alpha=5", "trainer.extra={adam_beta2: 0.95}")


def test_upstreams_names_are_found_in_the_installed_versions():
    assert "adamw_torch" in upstream.enum_values("training_args.py", "OptimizerNames")
    assert "cosine" in upstream.enum_values("trainer_utils.py", "SchedulerType")
    known = upstream.sft_config_options()
    assert {"neftune_noise_alpha", "max_length", "learning_rate"} <= known
    # A setting that upstream renames would be checked against nothing.
    assert set(extra_rules.DECIDED_ELSEWHERE) | extra_rules.WITHOUT_EFFECT <= known | {"include_num_input_tokens_seen"}


# -------------------------------------------------------------------------------------------------------- files


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "my_data.jsonl").write_text('{"a": 1}')
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    problem = problem_of("dataset.path=my_dota.jsonl")
    assert problem.why == "There is no such file." and problem.fix == "dataset.path=my_data.jsonl"
    assert f"looked in {tmp_path}" in problem_of("dataset.path=zzz.csv").fix
    assert "The folder itself holds no .json" in problem_of("dataset.path=folder").why
    assert ".json, .jsonl, .csv, .parquet" in problem_of("dataset.path=notes.txt").why
    assert problem_of("dataset.path=empty.csv").why == "The file is empty."
    accepted("dataset.path=my_data.jsonl")


@pytest.mark.parametrize("key", ["dataset.path", "dataset.eval_path"])
def test_a_pipe_is_refused_and_not_waited_for(key, tmp_path):
    os.mkfifo(tmp_path / "rows.csv")
    (tmp_path / "my_data.jsonl").write_text('{"a": 1}')
    others = [] if key == "dataset.path" else ["dataset.path=my_data.jsonl"]
    problem = problem_of(f"{key}=rows.csv", *others)
    assert problem.what == f"{key}=rows.csv" and problem.why.startswith("It is a pipe or a device")
    assert problem.fix.endswith("rows.csv > stored.csv   and name that file")


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert "no config.json" in problem_of("model.name=./run").why
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert problem_of("model.name=./run").fix == "model.name=run/model"
    accepted("model.name=run/model")


# ---------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{instruction}", "found 0 times"),
        ("{output} {instruction} {output}", "found 2 times"),
        ("{instruction} {output} {completion}", "found 2 times"),
        ("Q: {instruction A: {output}", "The braces do not match"),
        ("Q: {instruction}} A: {output}", "The braces do not match"),
        ("### {}\n{}\n{}", "need a name"),
        ("{instruction!r} {output}", "would be ignored"),
        ("{instruction:>10} {output}", "would be ignored"),
        ("{output}", "Nothing stands before the answer"),
        ("alpacca", "Neither a known template"),
        ("no braces at all", "Neither a known template"),
    ],
)
def test_templates_are_checked(template, words):
    assert words in problem_of(f'dataset.template="{template}"').why


def test_good_templates_are_taken():
    for template in (
        "Write a poem: {output}",
        "{question}: {output}",
        "Q: {instruction}\\nA: {completion}",
        "{{}} {input} {output}",
    ):
        accepted(f'dataset.template="{template}"')
    assert problem_of("dataset.template=alpacca").fix == "dataset.template=alpaca"


def test_a_system_prompt_that_no_template_would_show():
    assert "{system}" in problem_of("dataset.template=alpaca", "dataset.system_prompt=Brief").fix
    problem = problem_of('dataset.template="{instruction} {output}"', "dataset.system_prompt=Brief")
    assert "would be ignored" in problem.why and "dataset.system_prompt=null" in problem.fix
    accepted('dataset.template="{system} {instruction} {output}"', "dataset.system_prompt=Brief")


@pytest.mark.parametrize("override", ["trainer.eval_steps=0", "trainer.eval_steps=inf", "trainer.save_steps=inf"])
def test_no_step_count_is_refused_as_such_alone(override):
    assert "a whole number of steps" in problem_of(override).why


@pytest.mark.parametrize(
    "key",
    ["trainer.num_train_epochs", "trainer.warmup_steps", "trainer.weight_decay", "trainer.max_grad_norm", "trainer.max_hours",
     "lora.lora_alpha", "export.max_loss_increase"],
)  # fmt: skip
def test_values_without_end_are_refused(key):
    for value in ("inf", "nan"):
        assert "It has to be a number" in problem_of(f"{key}={value}").why


@pytest.mark.parametrize("key", ["model.name", "dataset.path", "model.chat_template", "hydra.run.dir", "resume"])
def test_paths_that_the_system_cannot_look_up(key):
    assert "name too long" in problem_of(f"{key}={'x' * 300}").why
    if key not in ("hydra.run.dir", "resume"):
        assert "no such user" in problem_of(f'{key}="~no_such_user/x"').why


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--experimental-rerun", "config.pickle"], "can run any code"),
        (["--shell-completion"], "install or uninstall"),
        (["-sc", "lora.r=4"], "install or uninstall"),
        (["-sc", "install=tcsh"], "bash, zsh or fish"),
        (["-sc", "install=bash", "query=bash"], "needs one word"),
    ],
)
def test_flags_that_hydra_ends_in_a_traceback_or_runs_unchecked_are_refused(words, why):
    problem = problem_of(*words)
    assert why in problem.why and problem.what.startswith(("--experimental-rerun config.pickle", "--shell-completion"))


def test_the_completion_that_the_refusal_names_is_taken():
    for shell in ("bash", "zsh", "fish"):
        accepted("--shell-completion", f"install={shell}")


def test_flags_that_cannot_be_read_are_refused_without_a_usage_text(capsys):
    assert "invalid choice" in problem_of("--cfg", "jobs").why
    assert "expected one argument" in problem_of("--config-dir").why
    assert SECRET not in str(refusal_of(f"-model.token={SECRET}"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("key", ["hydra.sweeper", "hydra.launcher"])
def test_a_single_value_for_a_table_of_hydras(key):
    problem = problem_of(f"{key}=x")
    assert "several settings" in problem.why and problem.fix == key.replace(".", "/") + "=sft"


def test_a_filter_with_a_bracket_in_brackets_is_taken_without_a_warning():
    accepted('dataset.keep.output="[[a]"')


def test_an_empty_word():
    assert "is empty" in problem_of("").why and "is empty" in problem_of(" ").why
