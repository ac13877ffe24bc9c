"""What users of Hydra type composes as in plain Hydra: their own folders, primary configs, launchers, grids of any value."""

import json
import logging
import pickle
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sft.cli.check import check_command_line, read_settings
from sft.config.compose import to_settings, where_it_looked
from sft.config.naming import job_name, names_by_group, run_name, tags_of
from sft.config.provenance import find_provenance, provenance_of
from sft.config.schema import Settings
from sft.errors import Problem, Refusal
from sft.sweep import checks, leaderboard, runner
from sft.sweep.index import SweepIndex
from tests import composing
from tests.conftest import ROOT
from tests.hints import hints_of

CONF = ROOT / "conf"

QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")

FILES = {
    "my/dataset/team/faq.yaml": "path: faq.csv\ncolumns: {instruction: question, output: answer}\n",
    "my/dataset/team/deep/er.yaml": "max_rows: 7\n",
    "my/lora/mine.yaml": "r: 4\n",
    "more/dataset/elsewhere.yaml": "max_rows: 9\n",
    "my/mine.yaml": "defaults: [config, {override dataset: team/faq}, _self_]\nlora: {r: 5}\n",
    "my/grid.yaml": "defaults: [config, _self_]\nhydra: {mode: MULTIRUN, sweeper: {params: {lora.r: '4,8'}}}\n",
    "my/path.yaml": "defaults: [config, _self_]\nhydra: {searchpath: [more]}\n",
    "my/experiment/faq.yaml": "# @package _global_\ndefaults: [{override /dataset: team/faq}]\nlora: {r: 6}\n",
    "my/experiment/ray.yaml": "# @package _global_\ndefaults: [{override /hydra/launcher: ray}]\n"
    "hydra: {mode: MULTIRUN, sweeper: {params: {lora.r: '4,8'}}}\n",
    "whole/config.yaml": "defaults: [schema, {lora: small}, _self_]\nseed: 5\n",
    "whole/lora/small.yaml": "r: 2\n",
    "my/team/small.yaml": "# @package _global_\nlora: {r: 3}\ntrainer: {max_steps: 4}\n",
    "my/team/large.yaml": "# @package _global_\nlora: {r: 64}\n",
    "my/teams.yaml": "defaults: [config, {team: small}, _self_]\n",
    "faq.csv": "question,answer\na,b\n",
}


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """A folder of one's own, another one, and a primary config that needs nothing of the project's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")


def problem_of(*argv: str) -> Problem:
    with pytest.raises(Refusal) as caught:
        check_command_line(CONF, list(argv))
    (problem,) = caught.value.problems
    assert problem.fix
    return problem


def main(monkeypatch, *argv: str) -> list[dict]:
    """The settings of each job that Hydra's own main starts for these words."""
    seen = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def app(config):
        seen.append(OmegaConf.to_container(config, resolve=True, enum_to_str=True))

    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    app()
    return seen


def plain(monkeypatch, *argv: str) -> list[Settings]:
    """The jobs of plain Hydra, with its own sweeper and launcher."""
    return [
        to_settings(OmegaConf.create(job))
        for job in main(monkeypatch, *argv, *QUIET, "hydra/sweeper=basic", "hydra/launcher=basic")
    ]


def ours(monkeypatch, *argv: str) -> list[Settings]:
    """The jobs of the same words here, checked and composed as for a run."""
    check_command_line(CONF, list(argv), hardware=False)
    seen = []

    def keep(sweep, todo):
        configs = [pickle.loads(sweep.composed[job.number]) for job in todo]
        for config, job in zip(configs, todo, strict=True):
            config.hydra.sweep.subdir = job.folder  # as a job is run
        seen.extend(runner._settings_of(config) for config in configs)
        sweep.planned.clear()
        sweep.lock.release()
        return True

    monkeypatch.setattr(runner.Sweep, "_run_here", keep)
    return seen + [to_settings(OmegaConf.create(job)) for job in main(monkeypatch, *argv, *QUIET)]


SINGLE = [
    [],
    ["model=tiny_random", "lora.r=32", "trainer.learning_rate=1e-4"],
    ["experiment=chat", "lora=r8"],
    ["+trainer.extra.neftune_noise_alpha=5", "dataset.columns={instruction: q}", "trainer.extra={adam_beta2: 0.9}"],
    ["lora.lora_alpha=${lora.r}", "++lora.r=3"],
    ["--config-dir", "my", "dataset=team/faq"],
    ["--config-dir", "my", "dataset=team/deep/er", "lora=mine"],
    ["--config-dir", "my", "experiment=faq", "lora=mine", "lora.r=9"],
    ["--config-dir", "my", "-cn", "mine"],
    ["--config-dir", "my", "-cn", "mine", "lora=r8", "lora.r=7"],
    ["hydra.searchpath=[more]", "dataset=elsewhere"],
    ["--config-dir", "my", "hydra.searchpath=[file://more]", "dataset=elsewhere", "lora=mine"],
    ["--config-dir", "my", "-cn", "path", "dataset=elsewhere"],
    ["--config-path", "{here}/whole"],
    ["sweep=rank", "hydra.mode=RUN"],
    ["--config-dir", "my", "+team=small", "lora.lora_alpha=6"],
    ["--config-dir", "my", "-cn", "teams", "team=large"],
    ["--config-dir", "my", "-cn", "teams", "~team"],
]

SWEEPS = [
    ["-m", "lora.r=4,8", "seed=1,2"],
    ["hydra.mode=MULTIRUN", "lora.r=4,8"],
    ["-m", "dataset.columns={instruction:question,output:answer},{instruction:answer,output:question}"],
    ["-m", "dataset.keep={a:x},{b:y}", "lora.r=4,8"],
    ["-m", 'dataset.system_prompt="Be brief.","Think, then = answer.","a \'b\' \\"c\\"","[x]{y}"'],
    ["-m", 'dataset.system_prompt=choice("Be brief.","1",a)', "lora.r=4"],
    ["-m", "lora.target_modules=[q_proj],[q_proj,v_proj]", "lora=r8,default"],
    ["-m", "seed=range(1,4)", "lora.r=choice(2,3)"],
    ["-m", "dataset=glob(a*)"],
    ["sweep=lr", "trainer.learning_rate=1e-3,2e-3"],
    ["-m", "sweep=rank", "lora.r=4,8"],
    ["--config-dir", "my", "-m", "dataset=team/faq,team/deep/er", "lora=mine,r8"],
    ["--config-dir", "my", "-m", "+team=small,large", "seed=1,2"],
    ["--config-dir", "my", "-cn", "grid"],
    ["--config-dir", "my", "-cn", "grid", "lora.r=16,32"],
]


@pytest.mark.parametrize("argv", SINGLE, ids=" ".join)
def test_one_run_is_composed_as_by_plain_hydra(monkeypatch, tmp_path, argv):
    argv = [word.format(here=tmp_path) if "{here}" in word else word for word in argv]
    (expected,) = plain(monkeypatch, *argv)
    assert ours(monkeypatch, *argv) == [expected]
    assert read_settings(CONF, argv, hardware=False) == expected


@pytest.mark.parametrize("argv", SWEEPS, ids=" ".join)
def test_a_sweep_has_the_jobs_of_plain_hydra(monkeypatch, argv):
    expected = plain(monkeypatch, *argv)
    assert len(expected) > 1 and ours(monkeypatch, *argv) == expected


def nodes_of(node):
    """All that stands in a config, as it was written, and what OmegaConf notes of it."""
    notes = {**vars(node._metadata), "resolver_cache": None}  # it holds the time
    inner = node._content if OmegaConf.is_config(node) else node._value()
    if not isinstance(inner, dict | list):
        return notes, inner
    return notes, [(key, nodes_of(each)) for key, each in (inner.items() if isinstance(inner, dict) else enumerate(inner))]


def test_what_the_tests_keep_of_composing_is_what_hydra_makes_anew(monkeypatch):
    """Met for the first time, met again, and composed without; and a file that has changed is read: tests/composing.py."""
    monkeypatch.setattr(composing, "_kept", {})
    keep, words = composing._keep, ["+trainer.extra.x=5", "lora=mine", "experiment=chat", "dataset.columns={instruction: q}"]

    def compose():
        return hydra.compose("config", ["hydra.searchpath=[my]", *words], return_hydra_config=True)

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        first, again = compose(), compose()
        assert len(composing._kept) == 2
        monkeypatch.setattr(composing, "_keep", lambda repo, words, make: make())
        assert nodes_of(first) == nodes_of(again) == nodes_of(compose()) and first.lora.r == 4
        monkeypatch.setattr(composing, "_keep", keep)
        Path("my/lora/mine.yaml").write_text("r: 7\n")
        assert compose().lora.r == 7


def test_a_misspelt_option_is_looked_for_in_all_folders_and_subfolders():
    assert problem_of("--config-dir", "my", "dataset=team/fqa").fix.startswith("dataset=team/faq")
    problem = problem_of("--config-dir", "my", "dataset=er")
    assert problem.fix.startswith("dataset=team/deep/er") and "team/faq" in problem.why
    assert "dataset=elsewhere" in problem_of("hydra.searchpath=[more]", "dataset=elswhere").fix


def test_an_option_of_a_group_of_ones_own_is_looked_for_too():
    assert problem_of("--config-dir", "my", "+team=smal").fix.startswith("+team=small")
    assert "-m" in problem_of("--config-dir", "my", "+team=small,large").fix


def test_several_values_are_not_shown_as_one_config():
    assert problem_of("hydra.mode=MULTIRUN", "lora.r=4,8", "--cfg", "job").fix == "lora.r=4"


@pytest.mark.parametrize("part", ["job", "hydra", "all"])
def test_each_part_of_the_config_can_be_shown_resolved(monkeypatch, capsys, part):
    assert main(monkeypatch, "model.name=Qwen/Qwen3-0.6B", "--cfg", part, "--resolve") == []
    shown = OmegaConf.create(capsys.readouterr().out)
    if part != "job":
        folder = OmegaConf.select(shown, "hydra.run.dir")
        assert folder.endswith("_Qwen3-0.6B_twists" if part == "all" else "_smollm2_135m_twists"), "settings are not in `hydra`"


def test_a_primary_config_that_cannot_be_composed_is_named_where_it_is():
    (problem,) = [problem_of("--config-dir", "my", "-cn", "mien")]
    assert problem.what == "mien.yaml" and "my" in problem.why and "conf/mien" not in str(problem)


def test_an_option_of_a_subfolder_makes_no_folder_inside_the_runs(monkeypatch, tmp_path):
    folders = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def app(config):
        folders.append(HydraConfig.get().runtime.output_dir)

    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", "my", "dataset=team/faq", *QUIET])
    app()
    assert folders[0].startswith(f"{tmp_path}/outputs/") and folders[0].endswith("_smollm2_135m_team-faq")
    names = names_by_group({"model": "m", "dataset": "team/faq", "lora": "default", "tracking": "wandb"}, {}, "M", None)
    assert tags_of(names) == ("m", "team/faq") == tags_of({**names, "experiment": "m"}), "each once"
    assert run_name(names, ()) == "m_team-faq" and job_name(names, "r=4") == "m_team-faq_r=4"


@pytest.mark.parametrize(
    ("path", "word"),
    [("faq.csv", "faq"), ("../data/my-rows.jsonl.gz", "my-rows"), ("/data/问答/", "问答"), ("*.json", "local"),
     ("a b.csv", "a"), ("[a.csv,b.csv]", "local"), ("null", "local"), ("c:\\d{}.csv", "c")],
)  # fmt: skip
def test_a_run_on_a_file_of_ones_own_is_called_by_it(monkeypatch, tmp_path, path, word):
    folders = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def app(config):
        folders.append(HydraConfig.get().runtime.output_dir)

    value = path if path[0] == "[" or path == "null" else f"'{path}'"
    monkeypatch.setattr(sys, "argv", ["train.py", "dataset=local", f"dataset.path={value}", *QUIET])
    app()
    assert folders[0].startswith(f"{tmp_path}/outputs/") and folders[0].endswith(f"_smollm2_135m_{word}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["model.name=Qwen/Qwen3-0.6B"], "Qwen3-0.6B twists"), (["model.name=/models/mine/"], "mine twists"),
     (["++model.name=.."], "smollm2_135m twists"), (["dataset.path=faq.csv"], "smollm2_135m faq"),
     (["model.max_seq_length=64"], "smollm2_135m twists"), (["model=tiny_random", "dataset=team/faq"], "tiny_random team/faq"),
     (["experiment=other"], "Qwen3-4B rows"), (["experiment=other", "model.name=a/b"], "b rows"),
     (["experiment=other", "dataset.path=faq.csv"], "Qwen3-4B faq")],
)  # fmt: skip
def test_a_run_is_not_called_by_an_option_whose_model_or_file_was_replaced(monkeypatch, tmp_path, overrides, words):
    (tmp_path / "my/experiment/other.yaml").write_text(
        "# @package _global_\ndefaults: [{override /dataset: local}]\n"
        "model: {name: Qwen/Qwen3-4B}\ndataset: {path: rows.json}\n",
        encoding="utf-8",
    )
    found = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def app(config):
        own = HydraConfig.get()
        names = names_by_group(own.runtime.choices, provenance_of(own), config.model.name, config.dataset.path)
        found.append((own.runtime.output_dir, tags_of(names)))

    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", "my", *overrides, *QUIET])
    app()
    ((folder, tags),) = found
    assert folder.startswith(f"{tmp_path}/outputs/") and folder.endswith("_" + words.replace(" ", "_").replace("/", "-"))
    assert set(words.split()) <= set(tags) and len(set(tags) & {"smollm2_135m", "twists", "local"} - set(words.split())) == 0


def test_a_setting_of_a_primary_config_says_so(tmp_path):
    found = find_provenance({"dataset": "team/faq", "team": "small"}, (), [CONF, tmp_path / "my"], "mine")
    assert found["trainer.max_steps"] == "my/team/small.yaml"
    assert found["lora.r"] == "my/mine.yaml" and found["dataset.path"] == "my/dataset/team/faq.yaml"
    assert found["samples.num_held_out"] == "conf/config.yaml"


# -------------------------------------------------------------------------------------------------- sweeps and launchers


def test_an_experiment_of_ones_own_chooses_a_launcher(monkeypatch):
    monkeypatch.setattr(checks, "_installed", lambda plugin: True)
    monkeypatch.setattr(checks, "gpu_present", lambda: True)
    check_command_line(CONF, ["--config-dir", "my", "experiment=ray"])
    monkeypatch.setattr(checks, "_installed", lambda plugin: False)
    assert problem_of("--config-dir", "my", "experiment=ray").what == "hydra/launcher=ray"


@pytest.mark.parametrize("name", ["basic", "joblib"])
def test_a_launcher_that_would_lose_the_table_and_the_exit_codes_is_refused_with_those_that_do_not(name):
    problem = problem_of("-m", "lora.r=4,8", f"hydra/launcher={name}")
    assert problem.what == f"hydra/launcher={name}"
    assert problem.fix.startswith("hydra/launcher=ray ") and "\nhydra/launcher=submitit_slurm " in problem.fix


def test_a_sweeper_that_is_not_there_is_refused_with_the_search_there_is():
    assert problem_of("-m", "lora.r=4,8", "hydra/sweeper=ax").fix.startswith("sweep=tpe ")


def test_a_sweeps_folders_are_named_as_hydra_sweep_subdir_says(monkeypatch, tmp_path):
    ours(monkeypatch, "-m", "lora.r=4,8", "hydra.sweep.dir=s", "hydra.sweep.subdir=rank_${lora.r}")
    ours(monkeypatch, "-m", "lora.r=4,8,16", "hydra.sweep.dir=s", "hydra.sweep.subdir=rank_${lora.r}")
    ours(
        monkeypatch, "-m", "seed=5,6", "hydra.sweep.dir=t", "hydra.sweep.subdir=${hydra:job.num}-${hydra.job.override_dirname}"
    )
    ours(monkeypatch, "-m", "seed=5,6", "hydra.sweep.dir=u")
    folders = [[job["folder"] for job in json.loads((tmp_path / s / "sweep.json").read_text())["jobs"]] for s in "stu"]
    assert folders == [["rank_4", "rank_8", "rank_16"], ["0-seed=5", "1-seed=6"], ["0_seed=5", "1_seed=6"]]


@pytest.mark.parametrize(
    ("subdir", "words", "fix"),
    [
        ("rank_${lora.r}", ("share the folder rank_4", "seed=1"), "'hydra.sweep.subdir=rank_${lora.r}_${hydra:job.num}'"),
        ("r/${seed}", ("one name",), "'hydra.sweep.subdir=r_${seed}'"),
        ("..", ("one name",), "leave hydra.sweep.subdir out"),
    ],
)
def test_a_name_that_is_no_folder_of_one_job_is_refused(monkeypatch, capsys, subdir, words, fix):
    with pytest.raises(SystemExit) as end:
        ours(monkeypatch, "-m", "lora.r=4", "seed=1,2", "hydra.sweep.dir=s", f"hydra.sweep.subdir={subdir}")
    told = capsys.readouterr().err
    assert end.value.code == 2 and f"hint: {fix}" in told and all(word in told for word in words)
    for hint in hints_of(Problem("", "", fix)):
        assert len(ours(monkeypatch, "-m", "lora.r=4", "seed=1,2", "hydra.sweep.dir=t", *hint)) == 2


def test_the_names_that_a_sweep_has_by_itself_are_those_of_the_shipped_config():
    assert OmegaConf.load(CONF / "config.yaml").hydra.sweep._get_node("subdir")._value() == runner.SUBDIR


def test_a_search_hands_texts_to_its_jobs_as_a_grid_does(monkeypatch):
    texts = ["Be brief.", "Think, then = answer.", "it's {a} [b]"]
    word = "dataset.system_prompt=choice(" + ",".join(f'"{text}"' for text in texts) + ")"
    sweeps = []
    monkeypatch.setattr(runner.Sweep, "_run_here", lambda sweep, todo: sweeps.append(sweep) or True)
    main(monkeypatch, "-m", word, "hydra.sweep.dir=s", *QUIET)
    grid = sweeps[0].index
    labels = [job.folder for job in grid.jobs]
    sweeps[0].index = SweepIndex(grid.folder)
    sweeps[0].composed.clear()
    sweeps[0].launch([[f"dataset.system_prompt={text}"] for text in texts])
    assert [job.settings["dataset.system_prompt"] for job in sweeps[0].index.jobs] == texts
    assert [job.folder for job in sweeps[0].index.jobs] == labels
    sweeps[0].planned.clear()


def test_lists_are_choices_of_a_search(monkeypatch):
    monkeypatch.setattr(checks, "_installed", lambda plugin: True)
    word = "lora.target_modules=choice([q_proj],[q_proj,v_proj])"
    check_command_line(CONF, ["sweep=tpe", word], hardware=False)
    assert [job.lora.target_modules for job in ours(monkeypatch, "-m", word)] == [["q_proj"], ["q_proj", "v_proj"]]


def test_long_texts_slashes_and_lists_make_short_plain_folders_and_keep_their_values(monkeypatch, tmp_path):
    long = "Think. " * 60
    texts = ours(monkeypatch, "-m", f'dataset.system_prompt="{long}","b/c: =x"', "hydra.sweep.dir=s")
    assert [job.dataset.system_prompt for job in texts] == [long, "b/c: =x"]
    lists = ours(monkeypatch, "-m", 'samples.prompts=["Hi, there?"],["a=b","c"]', "hydra.sweep.dir=t")
    assert [job.samples.prompts for job in lists] == [["Hi, there?"], ["a=b", "c"]]
    for job in [job for s in "st" for job in json.loads((tmp_path / s / "sweep.json").read_text())["jobs"]]:
        assert re.fullmatch(r"\d_[\w.,=-]{1,60}", job["folder"], re.ASCII), job["folder"]


def test_groups_options_and_keys_complete_in_a_shell():
    completion = BashCompletion(ConfigLoaderImpl(create_config_search_path(str(CONF))))
    assert {"model=", "lora=", "trainer=", "lora.", "seed="} <= {*completion._query("config", "")}
    assert completion._query("config", "model=tiny") == ["model=tiny_random"]
    assert completion._query("config", "lora.lora_al") == ["lora.lora_alpha="]
    check_command_line(CONF, ["-sc", "install=bash"])  # which is left to Hydra


def test_optunas_import_tells_of_no_plugins():
    assert not logging.getLogger("alembic.runtime.plugins.setup").isEnabledFor(logging.INFO)


def test_a_value_is_judged_alike_whatever_was_tried_before():
    wrong = "dataset.keep={instruction:[1,2]}"
    first = problem_of(wrong)
    assert problem_of("dataset.keep={instruction:x}", "lora.r=x").what == "lora.r=x" and problem_of(wrong) == first


def test_dictionaries_in_a_grid_are_checked_key_by_key():
    assert "dataset.columns.outptu" in problem_of("-m", "dataset.columns={instruction:a},{outptu:b}").what
    assert problem_of("-m", "dataset.keep={instruction:x},{output:[1,2]}").what.startswith("dataset.keep")
    assert "dataset.columns.<setting>" in problem_of("-m", "dataset.columns={instruction:a},3").fix


@pytest.mark.parametrize(
    "flags",
    [
        ["--config-dir", "my conf"],
        ["--config-path", "x", "--config-name", "mine"],
        ["hydra.searchpath=[a]", "hydra/launcher=ray"],
        [],
    ],
)
def test_a_suggested_command_repeats_where_the_first_one_looked(tmp_path, flags):
    command = shlex.join(["python", "train.py", *flags, "-m", "lora.r=4,8"])
    assert where_it_looked(command) == ([w for w in flags if "=" not in w], [w for w in flags if "=" in w])
    index = SweepIndex(tmp_path / "s", command=command)
    job = index.add(Settings(), {"experiment": "faq", "lora.r": "4"}, ["lora.r"])
    board, row = SimpleNamespace(index=index), SimpleNamespace(job=job)
    words = shlex.split(leaderboard._command(board, row, {"lora.r": "16,32"}))
    assert [word for word in flags if word in words] == flags and "lora.r=16,32" in words and "experiment=faq" in words
