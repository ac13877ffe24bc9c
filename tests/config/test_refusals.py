"""What is refused before anything heavy is imported: every mistake in one message, with a sentence and a way out."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sft.cli.check import check_command_line, read_settings, stop_on_refusal
from sft.config import rules, upstream
from sft.config.data_rules import check_dataset
from sft.config.fingerprint import config_hash
from sft.config.schema import DatasetSettings, ModelSettings
from sft.environment import hub_unreachable
from sft.errors import Problem, Refusal
from sft.export.hub import _reason
from sft.model.hub import refusing_failures
from sft.runs.resume import locked
from sft.storage.jsonio import jsonable
from tests.hints import problems_of, type_hints

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


def refusal_of(*argv: str, hardware: bool = True) -> Refusal:
    with pytest.raises(Refusal) as caught:
        check_command_line(CONF, list(argv), hardware)
    for problem in caught.value.problems:
        assert problem.what and "\n" not in problem.what
        assert len(problem.why.split()) > 2
        assert problem.fix, f"no hint: {problem}"
    type_hints(argv, caught.value.problems, lambda command: problems_of(command, hardware))
    return caught.value


def problem_of(*argv: str, hardware: bool = True) -> Problem:
    """The one problem of this command line."""
    (problem,) = refusal_of(*argv, hardware=hardware).problems
    return problem


def accepted(*argv: str) -> None:
    check_command_line(CONF, list(argv), hardware=False)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lora.rr=8"], "Did you mean lora.r?"),
        (["trainer.learning_rate=fast", "model=llama9", "+lora.q=1"], "Refused: 3 problems"),
        (["-m", "lora.r=8,x"], "lora.r=x"),
        (["--lora.r=8"], "hint: lora.r=8"),
        (["dataset.columns.instruction=questoin"], "questoin"),
        (["dataset.template=Q: {instruction} A: {output}"], """hint: 'dataset.template="Q: {instruction} A: {output}"'"""),
    ],
)
def test_train_py_refuses_at_once_and_leaves_nothing_behind(tmp_path, argv, words):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "no outputs/ folder"
    assert seconds < 2.5, "of processor time, which a busy machine stretches too; 0.9 s is usual"


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("trainer.learning_rate=fast", "This is not a number."),
        ("lora.r=8.5", "This is not a whole number."),
    ],
)
def test_a_value_of_another_kind_is_refused_with_one_that_can_be_typed(override, why):
    problem = problem_of(override)
    assert problem.why == why and problem.fix.startswith(override.partition("=")[0] + "=")


def test_settings_are_checked_without_torch():
    code = "import sys; from sft.cli.check import check_command_line as c; from pathlib import Path; "
    code += (
        f"c(Path({str(CONF)!r}), ['tracking=none']); print({{'torch', 'transformers', 'datasets', 'wandb'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


# -------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lora.rr=8", "lora.r=8"),
        ("+lora.rnak=8", "lora.r=8"),
        ("++trainer.learning_rat=1e-4", "trainer.learning_rate=1e-4"),
        ("dataset.columns.instructions=q", "dataset.columns.instruction=q"),
        ("dataset.colums.output=x", "dataset.columns.output=x"),
        ("lr=1e-4", "trainer.learning_rate=1e-4"),
        ("trainer.lr=1e-4", "trainer.learning_rate=1e-4"),
        ("epochs=3", "trainer.num_train_epochs=3"),
        ("max_steps=60", "trainer.max_steps=60"),
        ("trainer.max_seq_length=512", "model.max_seq_length=512"),
        ("lora.alpha=16", "lora.lora_alpha=16"),
        ("models=llama3_8b", "model=llama3_8b"),
        ("lora.r.x=1", "lora.r=1"),
        ("sed=1", "seed=1"),
    ],
)
def test_unknown_keys_come_with_the_one_that_was_meant(override, meant):
    problem = problem_of(override)
    assert problem.what == override.lstrip("+") and "There is no setting" in problem.why and "Did you mean" in problem.why
    assert problem.fix == meant


@pytest.mark.parametrize(
    "word",
    ['dataset.colums.output="问题"', '+dataset.columns.output="the (answer)"', '--dataset.system_prompt="Say \\"hi\\" & go"',
     'dataset.kep.output="^a|b$"', "samples.promts=['a b','c']"],
)  # fmt: skip
def test_a_value_in_quotes_keeps_them_in_the_hint(word):
    (typed,) = shlex.split(problem_of(word).fix)
    assert typed.partition("=")[2] == word.partition("=")[2]


def test_keys_like_no_other_list_what_there_is():
    assert "The groups are model, dataset, lora" in problem_of("banana=1").why
    assert "lora has: enabled, r, lora_alpha" in problem_of("lora.banana=1").why
    assert problem_of("trainer.neftune_noise_alpha=5").fix == "trainer.extra.neftune_noise_alpha=5"
    assert "trainer has: " in problem_of("trainer.banana=1").why


def test_a_group_is_no_single_setting():
    assert "is a group of settings" in problem_of("dataset.columns=instruction").why
    assert "samples.prompt" in problem_of("samples={prompt: [a]}").why
    accepted("samples={num_held_out: 2}", "dataset.columns={instruction: q}")


@pytest.mark.parametrize("text", ["lora", "lora.r", "resume"])
def test_a_word_without_a_value(text):
    assert problem_of(text).fix == f"{text}=<value>"


def test_what_an_agent_of_a_sweep_types_is_taken_or_mended():
    accepted("lora.target_modules=['q_proj', 'v_proj']", "lora.use_rslora=True")
    assert problem_of("--lora.r=4").fix == "lora.r=4"


def test_the_plus_sign_is_not_needed():
    assert problem_of("+lora.r=8").fix == "lora.r=8"
    assert problem_of("+experiment=chat").fix == "experiment=chat"
    accepted("++lora.r=8", "+trainer.extra.neftune_noise_alpha=5")


@pytest.mark.parametrize(("text", "fix"), [("~lora", "lora=none"), ("~lora.r", "lora.r=<value>"), ("~model", "model=<value>")])
def test_settings_cannot_be_removed(text, fix):
    assert problem_of(text).fix == fix


# ------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("group", ["model", "dataset", "lora", "trainer", "export", "tracking", "experiment"])
def test_unknown_options_list_the_known_ones(group):
    problem = problem_of(f"{group}=banana")
    options = [file.stem for file in (CONF / group).glob("*.yaml")]
    assert problem.what == f"{group}=banana" and all(option in problem.why for option in options)


def test_the_closest_option_is_offered_and_the_other_ways():
    assert problem_of("dataset=ruozhibar").fix.splitlines()[0] == "dataset=ruozhiba"
    assert "model.name=Qwen/Qwen3-4B" in problem_of("model=Qwen/Qwen3-4B").fix
    assert "dataset=local dataset.path=my.jsonl" in problem_of("dataset=my.jsonl").fix
    assert problem_of("lora=null").fix == "lora=none"
    assert problem_of("model=null").fix.startswith("model=")


def test_one_option_and_not_a_mapping_or_a_list():
    assert problem_of("lora={r: 8, lora_alpha: 2}").fix == "lora.r=8 lora.lora_alpha=2"
    assert "-m model=tiny_random,smollm2_135m" in problem_of("model=[tiny_random,smollm2_135m]").fix


def test_a_folder_of_ones_own_adds_options(tmp_path):
    (tmp_path / "my conf" / "lora").mkdir(parents=True)
    (tmp_path / "my conf" / "lora" / "mine.yaml").write_text("r: 4\n")
    accepted("--config-dir", "my conf", "lora=mine", "lora.lora_alpha=8")
    assert read_settings(CONF, ["--config-dir", "my conf", "lora=mine"], hardware=False).lora.r == 4
    assert "mine" in problem_of("--config-dir", "my conf", "lora=other").why
    (tmp_path / "my conf" / "lora" / "wrong.yaml").write_text("rank: 4\n")
    assert "rank" in str(refusal_of("--config-dir", "my conf", "lora=wrong"))
    assert "no such folder" in problem_of("--config-dir", "elsewhere").why


def test_flags_that_do_not_fit(tmp_path):
    assert problem_of("--model=llama3_8b").fix == "model=llama3_8b"
    assert problem_of("--verbose").fix == "verbose=<value>"
    assert "put the flags first" in problem_of("lora.r=8", "-m", "seed=1,2").fix
    assert f"--config-dir {tmp_path}" in problem_of("--config-path", str(tmp_path)).fix
    assert "Cannot find primary config 'foo'" in problem_of("--config-name", "foo").why


# ------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("lora.r=abc", "a whole number"),
        ("lora.r=1.5", "a whole number"),
        ("lora.r=", "a whole number"),
        ("lora.r=null", "a whole number"),
        ("trainer.learning_rate=2e-4x", "a number"),
        ("dataset.shuffle=maybe", "true or false"),
        ("dataset.max_rows=ten", "a whole number or null"),
        ("dataset.shape=table", "auto | instruction | prompt_completion"),
        ("tracking.mode=ofline", "auto | online | offline"),
        ("lora.target_modules=q_proj", "a list: [a,b]"),
        ("dataset.keep=abc", 'pairs: {column: "text"}'),
        ("seed=[1]", "a whole number"),
    ],
)
def test_wrong_types_name_the_right_one(override, kind):
    problem = problem_of(override)
    assert problem.what == override and kind in problem.fix


@pytest.mark.parametrize(
    "override",
    [
        "lora.r=0", "lora.lora_dropout=1", "dataset.eval_fraction=1", "dataset.max_rows=0", "trainer.max_steps=0", "seed=-1",
        "trainer.learning_rate=0", "trainer.eval_steps=1.5", "trainer.save_steps=0", "samples.max_new_tokens=0",
        "trainer.num_train_epochs=-1", "model.max_seq_length=4", "trainer.early_stopping_patience=0",
        "trainer.learning_rate=nan",
    ],
)  # fmt: skip
def test_numbers_out_of_range_name_the_range_and_the_default(override):
    problems = refusal_of(override).problems
    assert problems[0].what == override and problems[0].why.startswith("It has to be") and "is the default" in problems[0].fix


@pytest.mark.parametrize("key", ["dataset.path", "model.name", "dataset.template", "dataset.system_prompt", "dataset.split"])
def test_empty_values_are_not_taken_for_null(key):
    """As in `dataset.path=$FILE` with FILE unset, which would train on the default data."""
    problem = problem_of(f"{key}=")
    assert problem.what == f"{key}=" and problem.why == "The value is empty."


def test_many_problems_come_in_one_message():
    refusal = refusal_of(
        "lora.rr=8", "model=banana", "trainer.learning_rate=x", "dataset.template={output", "dataset.max_rows=0"
    )
    text = str(refusal)
    assert len(refusal.problems) == 5 and text.startswith("Refused: 5 problems; nothing was trained.")
    for number, what in enumerate(("lora.rr=8", "model=banana", "trainer.learning_rate=x", "dataset.max_rows=0"), 1):
        assert what in text and f"  {number}. " in text


def test_interpolations_are_judged_by_what_they_come_to():
    accepted("lora.lora_alpha=${lora.r}")
    assert "lora.q" in problem_of("lora.lora_alpha=${lora.q}").why
    assert problem_of("lora.lora_alpha=${lora.q}").what == "lora.lora_alpha=${lora.q}"
    problem = problem_of("lora.r=${model.name}")
    assert "Integer" in problem.why and "lora.r" in problem.what


@pytest.mark.parametrize(
    "override",
    [
        "dataset.template=Q: {instruction}\nA: {output}", "dataset.system_prompt=你是助手", "dataset.path=数据.jsonl",
        'dataset.system_prompt=Say "hi"', "dataset.system_prompt=It's (a) {b}", "dataset.keep.output=(",
        "dataset.system_prompt='open", "model.name=/x/epoch=1-step=5", "dataset.system_prompt=Be brief, please.",
        "dataset.system_prompt=Be kind, be brief",
    ],
)  # fmt: skip
def test_a_text_that_lost_its_quotes_is_shown_with_them(override):
    """The hint, typed into a shell, has to give the text that was meant."""
    problem = problem_of(override)
    (typed,) = shlex.split(problem.fix.splitlines()[0].removesuffix("   for one text"))
    key, _, text = override.partition("=")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(typed)
    assert parsed.key_or_group == key and parsed.value() == text.replace("\n", "\\n")


def test_other_quoting_mistakes():
    assert problem_of("'lora.r=8'").fix == "lora.r=8"
    assert "double quotes" in problem_of("lora.target_modules=[q_proj").fix
    assert "double quotes" in problem_of("samples.prompts=[你好]").fix
    accepted('samples.prompts=["你好"]', 'dataset.system_prompt="你是助手，{x}"', 'dataset.keep={output: ".{20,}"}')


# ------------------------------------------------------------------------------------------------------- sweeps


def test_several_values_need_a_sweep_brackets_or_quotes():
    assert problem_of("lora.r=8,16").fix == "python train.py -m lora.r=8,16   for a sweep"
    assert problem_of("lora.target_modules=q_proj,v_proj").fix == "'lora.target_modules=[q_proj,v_proj]'"
    assert problem_of("lora.r=range(1,4,2)").fix == "python train.py -m 'lora.r=range(1,4,2)'   for a sweep"
    assert "-m" in problem_of("model=tiny_random,smollm2_135m").fix
    assert problem_of("hydra.run.dir=a,b").fix == """'hydra.run.dir="a,b"'   for one text"""
    assert "one value for all jobs" in problem_of("-m", "hydra.run.dir=a,b", "lora.r=8,16").why
    assert "one value for all jobs" in problem_of("hydra/launcher=sft,basic").why


def test_every_value_of_a_sweep_is_checked():
    accepted("-m", "lora.r=range(1,4)", "trainer.learning_rate=1e-4,2e-4", "model=tiny_random,smollm2_135m", "seed=choice(1,2)")
    assert problem_of("-m", "lora.r=8,x").what == "lora.r=x"
    assert problem_of("-m", "model=tiny_random,banana").what == "model=banana"
    assert problem_of("-m", "lora.r=range(0,3)").what == "lora.r=0"
    assert problem_of("-m", "trainer.optim=adamw_torch,adam_banana").what == "trainer.optim=adam_banana"
    assert problem_of("-m", "lora.r=interval(1,3)").fix.startswith("sweep=tpe 'lora.r=int(interval(1,3))'")
    accepted("-m", "model=glob(tiny*)")


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
    assert set(rules.DECIDED_ELSEWHERE) | rules.WITHOUT_EFFECT <= known | {"include_num_input_tokens_seen"}


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


# ------------------------------------------------------------------------------------------------------ secrets

SECRET = "hf_" + "aB3" * 10


@pytest.mark.parametrize(
    "override",
    [
        f"model.token={SECRET}", f"tracking.project={SECRET}", f"+hub.password={SECRET}", f"trainer.extra.hub_token={SECRET}",
        f"--token={SECRET}", f"tracking.api_key={'0123456789' * 4}", f"tracking.name={'0123456789' * 4}", f"wandb-key={SECRET}",
        f'tracking.name="{SECRET}"', f"+env=[{SECRET}]",
    ],
)  # fmt: skip
def test_secrets_are_refused_and_never_shown(override):
    refusal = refusal_of(override)
    assert "HF_TOKEN or WANDB_API_KEY" in str(refusal)
    assert SECRET not in str(refusal) and "0123456789" not in str(refusal)


def test_secrets_as_words_of_their_own_are_not_shown_either():
    for argv in (["--token", SECRET], [SECRET], ["-m", "lora.r=8", "--auth", SECRET], ["lora.r=8", "-m", SECRET]):
        assert SECRET not in str(refusal_of(*argv))


def test_a_broken_file_is_named_and_not_the_overrides(tmp_path):
    (tmp_path / "config.yaml").write_text("defaults: [\n")
    with pytest.raises(Refusal) as refusal:
        check_command_line(tmp_path, ["lora.r=8"])
    assert refusal.value.problems[0].what == "config.yaml" and "git" in refusal.value.problems[0].fix


def test_what_only_looks_like_a_secret_is_let_through():
    commit = "0123456789" * 4
    accepted(f"model.revision={commit}", f"dataset.revision={commit}", "samples.max_new_tokens=5")
    accepted('dataset.keep={key: "x"}', "dataset.keep.token=x")
    assert "no such folder" in problem_of(f"model.name=/cache/snapshots/{commit}").why


# --------------------------------------------------------------------------------------------------- run folders


def test_a_run_folder_that_holds_a_run_is_refused(tmp_path):
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    accepted("hydra.run.dir=outputs/mine")
    (tmp_path / "outputs" / "mine" / "run.json").write_text("{}")
    problem = problem_of("hydra.run.dir=outputs/mine/")
    assert "outputs/mine" in problem.why and "holds a run already" in problem.why
    assert "hydra.run.dir=outputs/mine_2" in problem.fix
    accepted("hydra.run.dir=outputs/${seed}", "hydra.run.dir=outputs/other")


def test_the_same_run_may_go_on_in_its_folder_and_any_other_is_refused(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = read_settings(CONF, ["lora.r=8"])
    record = {"status": "running", "config_hash": config_hash(settings), "settings": jsonable(settings)}
    (folder / "run.json").write_text(json.dumps(record))
    accepted("lora.r=8", "hydra.run.dir=mine", "trainer.max_hours=2", "tracking=none")
    accepted("resume=mine")
    problem = problem_of("lora.r=16", "hydra.run.dir=mine")
    assert "lora.r is 8 there and 16 here" in problem.why and "resume=mine" in problem.fix
    assert "would be ignored" in problem_of("resume=mine", "lora.r=16").why
    assert "sweep" in problem_of("resume=mine", "-m").why or "ignored" in problem_of("resume=mine", "-m").why
    assert "no such folder" in problem_of("resume=nowhere").why
    with locked(folder):
        assert "Another process" in problem_of("resume=mine").why
        assert "Another process" in problem_of("lora.r=8", "hydra.run.dir=mine").why
    (folder / "run.json").write_text(json.dumps({**record, "status": "finished"}))
    assert "finished" in problem_of("resume=mine").why
    assert "holds a run already" in problem_of("lora.r=8", "hydra.run.dir=mine").why


def test_a_run_folder_cannot_have_code_of_a_model_run_by_its_own_word(tmp_path, monkeypatch):
    """The word stands on the command line, on either side of resume=, and reaches the run; no other setting may join it."""
    (tmp_path / "mine").mkdir()
    settings = read_settings(CONF, ["model.trust_remote_code=true", "model.name=somebody/model", "model.backend=transformers"])
    record = {"status": "running", "config_hash": config_hash(settings), "settings": jsonable(settings)}
    (tmp_path / "mine" / "run.json").write_text(json.dumps(record))
    problem = problem_of("resume=mine", hardware=False)
    assert "somebody/model" in problem.why and problem.fix.startswith("model.trust_remote_code=true ")
    assert "would be ignored" in problem_of("resume=mine", "model.trust_remote_code=false").why
    assert "lora.r=16" in problem_of("resume=mine", "model.trust_remote_code=true", "lora.r=16").why
    with pytest.raises(Refusal, match="somebody/model"):
        read_settings(CONF, ["resume=mine"], hardware=False)
    for words in (["resume=mine", "model.trust_remote_code=true"], ["model.trust_remote_code=true", "resume=mine"]):
        accepted(*words)
        assert read_settings(CONF, words, hardware=False).model.trust_remote_code
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        stop_on_refusal(CONF, hardware=False)
        assert sys.argv[-1] == "model.trust_remote_code=true" and sys.argv[1] == f"resume='{tmp_path}/mine'"


def test_help_beside_resume_is_help(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", "resume=mine", "--help"])
    stop_on_refusal(CONF)
    assert sys.argv[1:] == ["resume=mine", "--help"]


def test_a_folder_that_cannot_be_written_is_refused():
    assert "Nothing can be written to /proc" in problem_of("hydra.run.dir=/proc/mine").why


def test_limits_by_the_clock():
    accepted("trainer.stop_at=17:30")
    accepted('trainer.stop_at="2026-12-31 17:30"')
    assert "no moment" in problem_of("trainer.stop_at=25:00").why
    assert "above 0" in problem_of("trainer.max_hours=0").why
    assert "at least 0" in problem_of("trainer.max_bad_steps=-1").why


def test_hydras_own_settings():
    assert "dirr" in problem_of("hydra.run.dirr=x").why
    assert "foo" in problem_of("hydra/launcher=foo").why
    accepted("hydra.sweep.dir=x", "hydra.job.name=y")


@pytest.mark.parametrize("flag", ["--help", "--hydra-help", "-h"])
def test_questions_to_hydra_are_not_checked(flag):
    check_command_line(CONF, [flag, "lora.rr=8"])


def test_looking_at_the_config_needs_no_gpu():
    check_command_line(CONF, ["--cfg", "job", "experiment=colab_notebook"])
    assert len(refusal_of("experiment=colab_notebook").problems) == 2


@pytest.mark.parametrize("group", ["model", "dataset", "lora", "trainer", "tracking", "experiment"])
def test_every_option_of_every_group_is_accepted(group):
    for file in sorted((CONF / group).glob("*.yaml")):
        extra = ["dataset.path=rows.jsonl"] if file.stem == "local" else []
        if extra:
            Path("rows.jsonl").write_text('{"a": 1}')
        accepted(f"{group}={file.stem}", *extra)


def test_an_experiment_that_overrules_a_chosen_option_is_refused():
    problem = problem_of("experiment=colab_notebook", "lora=r64", hardware=False)
    assert "lora.r=16" in problem.why and "lora.r=64 lora.lora_alpha=64" in problem.fix
    accepted("experiment=colab_notebook", "model=llama3_1_8b")
    accepted("experiment=colab_notebook", "lora=r64", "lora.r=64", "lora.lora_alpha=64")


def test_resume_from_checkpoint_is_refused_as_without_effect():
    assert "no effect" in problem_of("trainer.extra.resume_from_checkpoint=x").why


def test_cfg_of_a_sweep_is_refused():
    assert "--cfg" in problem_of("-m", "--cfg", "job", "lora.r=8,16").what


# ----------------------------------------------------------------------------------------------- the hub's names


@pytest.mark.parametrize(
    ("repo", "why", "fix"),
    [
        ("model", "names no owner", "export.hub.repo=<user>/model   "),
        ("'my model'", "names no owner", "export.hub.repo=<user>/my-model   "),
        ("https://huggingface.co/me/model", "one slash", "export.hub.repo=me/model"),
        ("models/me/model", "one slash", "export.hub.repo=me/model"),
        ("me/sub/model", "one slash", "export.hub.repo=me/model"),
        ("/me/model", "one slash", "export.hub.repo=me/model"),
        ("'me/my model'", "letters, digits", "export.hub.repo=me/my-model"),
        ("me/-model", "letters, digits", "export.hub.repo=me/model"),
        ("me/model.", "letters, digits", "export.hub.repo=me/model"),
        ("me/a--b", "neither -- nor ..", "export.hub.repo=me/a-b"),
        ("me/a..b", "neither -- nor ..", "export.hub.repo=me/a.b"),
        ("me/model.git", ".git", "export.hub.repo=me/model"),
        ("me/" + "a" * 88, "too long", "export.hub.repo=me/" + "a" * 87),
    ],
)
def test_a_repository_that_the_hub_would_not_take_comes_with_one_that_it_would(repo, why, fix):
    found = problem_of("export=adapter", f"export.hub.repo={repo}")
    assert why in found.why and found.fix.startswith(fix)
    from huggingface_hub.utils import validate_repo_id

    offered = found.fix.split()[0].removeprefix("export.hub.repo=")
    validate_repo_id(offered.replace("<user>", "me") + "-bnb-4bit")


@pytest.mark.parametrize("repo", ["me/model", "me/Llama-3.1_8B.v2", "0/1", "my-org/x", "me/" + "a" * 87])
def test_repositories_that_the_hub_takes(repo):
    accepted("export=adapter", f"export.hub.repo={repo}")


@pytest.mark.parametrize("repo", ["", "'  '"])
def test_an_empty_repository_is_not_taken_for_none(repo):
    assert problem_of("export=adapter", f"export.hub.repo={repo}").fix.startswith("export.hub.repo=null")


def test_speed_that_cannot_be_had():
    backend = ("model.backend=transformers",)
    assert "no GPU" in problem_of(*backend, "trainer.torch_compile=true").why
    assert "no GPU" in problem_of(*backend, "trainer.cuda_graphs=true").why
    assert "no GPU" in problem_of(*backend, "trainer.max_memory_gib=16").why
    there = (*backend, "preflight.mode=only", "preflight.gpu=h100", "trainer.cuda_graphs=true")
    assert "lora_dropout=0.1 draws anew" in problem_of(*there, "lora.lora_dropout=0.1").why
    accepted(*there, "trainer.gradient_checkpointing=true")
    assert "eager" in problem_of(*backend, "trainer.padding_free=true", "model.attn_implementation=eager").why
    assert "neftune" in problem_of(*backend, "trainer.padding_free=true", "trainer.extra.neftune_noise_alpha=5").why
    assert "trainer.torch_compile" in problem_of("trainer.extra.torch_compile=true").fix
    accepted(*backend, "trainer.padding_free=true")


def test_a_limit_of_memory_that_is_none():
    for value in ("0", "0.5", "-3", "inf"):
        assert "at least 1, or null" in problem_of(f"trainer.max_memory_gib={value}").why


def test_a_cache_folder_that_cannot_be_written_is_refused_with_the_variable(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("SFT_CACHE", str(file / "cache"))
    with pytest.raises(Refusal, match="SFT_CACHE=<a folder that can be written>"):
        check_command_line(ROOT / "conf", ["preflight.mode=only"])


def test_a_link_to_itself_is_not_its_own_hint(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.symlink_to(path)
    (problem,) = check_dataset(DatasetSettings(path=str(path)))
    assert f"dataset.path={path}" not in problem.fix


NO_JSON = ValueError("Expecting value: line 1 column 1 (char 0)")
NO_HEADER = OSError("Response from https://h/model.safetensors is missing the 'X-Repo-Commit' header, so it does not seem")


@pytest.mark.parametrize("error", [NO_JSON, NO_HEADER])
@pytest.mark.parametrize("way", ["itself", "cause", "context"])
def test_a_page_that_is_not_the_hubs_is_said(error, way):
    outer = error if way == "itself" else OSError("cannot load a file that is named model.safetensors")
    if way != "itself":
        setattr(outer, f"__{way}__", ConnectionError("in between"))
        setattr(getattr(outer, f"__{way}__"), f"__{way}__", error)
    told = "answered with a page that is not the hub's (a proxy or a login page?)"
    assert told in str(hub_unreachable("model.name=x", outer, "model.name=/path"))
    with pytest.raises(Refusal, match=re.escape(told)), refusing_failures(ModelSettings(name="me/no-such-model")):
        raise outer
    assert told in _reason(outer)


def test_a_broken_file_of_a_model_folder_is_not_taken_for_a_page(tmp_path):
    with pytest.raises(ValueError, match="Expecting value"), refusing_failures(ModelSettings(name=str(tmp_path))):
        raise NO_JSON


@pytest.mark.parametrize("name", ["MY_TOKEN", "aws_secret_access_key", "API_KEY", "MYSECRET", "DB_PASSWORD", "HF_TOKEN,none"])
def test_a_setting_is_not_filled_with_what_is_named_like_a_secret(monkeypatch, name):
    monkeypatch.setenv(name.partition(",")[0], "hunter2")
    with pytest.raises(Refusal) as refusal:
        check_command_line(ROOT / "conf", [f"dataset.system_prompt=${{oc.env:{name}}}", "preflight.mode=only"], hardware=False)
    (problem,) = refusal.value.problems
    assert problem.what == f"${{oc.env:{name.partition(',')[0]}}}" and "named like a secret" in problem.why
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"])
def test_a_folder_of_hydras_is_not_filled_with_what_is_named_like_a_secret_or_is_not_set(monkeypatch, key):
    monkeypatch.setenv("X_TOKEN", "hunter2")
    problem = problem_of(f"{key}=${{oc.env:X_TOKEN}}", "lora.r=16")
    assert problem.what == "${oc.env:X_TOKEN}" and "named like a secret" in problem.why and "hunter2" not in str(problem)
    monkeypatch.delenv("X_TOKEN")
    problem = problem_of(f"{key}=${{oc.env:X_PLACE}}", "lora.r=16")
    assert problem.what == f"{key}=${{oc.env:X_PLACE}}" and "'X_PLACE' not found" in problem.why
    accepted(f"{key}='${{oc.env:HOME}}/${{now:%Y}}_${{hydra:job.num}}_${{job_label:${{hydra:overrides.task}}}}_${{lora.r}}'")


@pytest.mark.parametrize("name", ["MAX_TOKENS", "TOKENIZER", "KEYBOARD", "MONKEY", "HOME"])
def test_other_variables_of_the_environment_fill_a_setting(monkeypatch, name):
    monkeypatch.setenv(name, "plain")
    argv = [f"dataset.system_prompt=${{oc.env:{name}}}"]
    assert read_settings(ROOT / "conf", argv, hardware=False).dataset.system_prompt == "plain"


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("warmup_ratio=0.1", "trainer.warmup_steps=0.1"),
        ("group_by_length=true", "trainer.extra.train_sampling_strategy=group_by_length"),
        ("use_liger=false", "trainer.extra.use_liger_kernel=false"),
        ("adafactor=true", "trainer.optim=adafactor"),
        ("max_seq_length=512", "model.max_seq_length=512"),
        ("dispatch_batches=false", "'trainer.extra.accelerator_config={dispatch_batches: false}'"),
        ("warmup_stps=3", "trainer.warmup_steps=3"),
        ("learning_rat=0.001", "trainer.learning_rate=0.001"),
        ("neftune_noise=5", "trainer.extra.neftune_noise_alpha=5"),
    ],
)
def test_an_option_of_another_name_gets_a_hint_that_is_accepted(given, fix):
    hint = problem_of(f"trainer.extra.{given}").fix.partition("   ")[0]
    assert hint == fix
    accepted(*shlex.split(hint))


def test_no_hint_names_an_option_that_is_refused_itself():
    known = upstream.sft_config_options()
    assert not set(rules.RENAMED) & known, "these are options of the installed version"
    for name in rules.RENAMED:
        for line in problem_of(f"trainer.extra.{name}=1").fix.splitlines():
            word = line.partition("   ")[0].partition("=")[0].lstrip("'").removeprefix("trainer.extra.")
            assert word not in (*rules.DECIDED_ELSEWHERE, *rules.WITHOUT_EFFECT), line


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (["trainer.extra.loss_type=chunked_nll", "trainer.extra.label_smoothing_factor=0.1"], "trainer.extra.loss_type=nll"),
        (["trainer.extra.loss_type=dft", "trainer.extra.label_smoothing_factor=0.1"], "trainer.extra.loss_type=nll"),
        (["trainer.extra.loss_type=chunked"], "trainer.extra.loss_type=chunked_nll"),
        (["trainer.extra.use_liger_kernel=true"], "pip install liger-kernel"),
        (["trainer.lr_scheduler_type=reduce_lr_on_plateau", "dataset.eval_fraction=0"], "dataset.eval_fraction=0.1"),
    ],
)
def test_losses_and_schedules_that_do_not_fit_are_refused_with_what_does(argv, fix):
    assert problem_of(*argv).fix.startswith(fix)


def test_liger_with_another_loss_is_refused_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: object())
    argv = ["trainer.extra.use_liger_kernel=true", "trainer.extra.loss_type=chunked_nll"]
    assert problem_of(*argv).fix == "leave trainer.extra.loss_type out"
    argv = ["trainer.extra.use_liger_kernel=true", "trainer.extra.label_smoothing_factor=0.1"]
    assert problem_of(*argv).fix.startswith("leave trainer.extra.use_liger_kernel out")


@pytest.mark.parametrize(("kind", "other"), [("iq2_xxs", "q2_k"), ("IQ3_XS", "iq3_s"), ("q2_k_s", "q2_k"), ("iq2_m", "q2_k")])
def test_a_gguf_type_that_needs_an_importance_matrix_is_refused_and_not_offered(kind, other):
    assert problem_of("export=gguf", "export.gguf.quantizations=[Q4_K_M]").fix == "export.gguf.quantizations=[q4_k_m]"

    problem = problem_of("export=gguf", f"export.gguf.quantizations=[q8_0,{kind}]")
    assert "importance matrix" in problem.why and problem.fix == f"export.gguf.quantizations=[q8_0,{other}]"
    offered = problem.why.partition("It can be: ")[2].rstrip(".").split(", ")
    assert other in offered and not set(offered) & set(upstream.NOT_MADE)
    accepted("export=gguf", problem.fix)
