"""Secrets, run folders, names of the hub and caches that are refused before anything heavy is imported."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from sft.cli.check import check_command_line, read_settings, stop_on_refusal
from sft.config import extra_rules, rules, upstream
from sft.config.data_rules import check_dataset
from sft.config.fingerprint import config_hash
from sft.config.schema import DatasetSettings, ModelSettings
from sft.environment import hub_unreachable
from sft.errors import Refusal
from sft.export.hub import _reason
from sft.model.hub import refusing_failures
from sft.runs.resume import locked
from sft.storage.jsonio import jsonable
from tests.config.refused import CONF, SECRET, accepted, problem_of, refusal_of
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("no_gpu")


# ------------------------------------------------------------------------------------------------------ secrets


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
    assert not set(extra_rules.RENAMED) & known, "these are options of the installed version"
    for name in extra_rules.RENAMED:
        for line in problem_of(f"trainer.extra.{name}=1").fix.splitlines():
            word = line.partition("   ")[0].partition("=")[0].lstrip("'").removeprefix("trainer.extra.")
            assert word not in (*extra_rules.DECIDED_ELSEWHERE, *extra_rules.WITHOUT_EFFECT), line


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
