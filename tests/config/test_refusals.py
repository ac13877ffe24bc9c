"""What is refused before anything heavy is imported: every mistake in one message, with a sentence and a way out."""

import os
import resource
import shlex
import subprocess
import sys

import pytest

from sft.cli.check import read_settings
from tests.config.refused import CONF, accepted, problem_of, refusal_of
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_gpu")


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
