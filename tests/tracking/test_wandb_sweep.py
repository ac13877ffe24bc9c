"""Sweeps of W&B: the YAML that is written for them, and a run that one of their agents starts."""

import gc
import importlib
import os

import pytest
import yaml

from scripts import wandb_sweep
from sft.cli.check import check_command_line
from sft.errors import Refusal
from sft.tracking.base import make_trackers
from tests.conftest import ROOT, make_settings
from tests.tracking.test_wandb_names import TRACKED, read_back


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_MODE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


def started_by_an_agent(sweep: dict, values: dict) -> list[str]:
    """The words after train.py that W&B's own agent makes of a sweep and of one choice of its parameters."""
    from wandb.sdk.launch.sweeps import utils

    args = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    words = utils.create_sweep_command(list(sweep["command"]))
    assert words[:3] == ["${env}", "${interpreter}", "${program}"] and words[-1] == "${args_no_hyphens}"
    return [*words[3:-1], *args["args_no_hyphens"]]


@pytest.mark.parametrize("argv, settings", [
    (["-m", "model=tiny_random", "lora.r=4,8", "trainer.learning_rate=1e-4,2e-5"], {"r": 8, "learning_rate": 2e-5}),
    (["-m", "lora=r8,r32"], {"r": 32}),
    (["sweep=lr_by_rank"], {"r": 64, "learning_rate": 8e-4, "lora_alpha": 64}),
    (["-m", 'dataset.system_prompt="Be brief.","Think, then = answer."'], {"system_prompt": "Think, then = answer."}),
    (["-m", "lora.target_modules=[q_proj],[q_proj,v_proj]"], {"target_modules": ["q_proj", "v_proj"]}),
    (["-m", "lora.use_rslora=false,true"], {"use_rslora": True}),
    (["-m", "lora.r=4,8", "lora.lora_alpha=${lora.r}", "tracking.mode=online"], {"lora_alpha": 8}),
])  # fmt: skip
def test_an_agent_starts_the_jobs_that_the_command_line_has(argv, settings):
    sweep = yaml.safe_load(yaml.safe_dump(wandb_sweep.make_sweep(argv)))
    assert (sweep["method"], sweep["metric"]) == ("grid", {"name": "eval/loss", "goal": "minimize"})
    last = {key: entry["values"][-1] for key, entry in sweep["parameters"].items()}
    words = started_by_an_agent(sweep, last)
    check_command_line(ROOT / "conf", words, hardware=False)
    made = make_settings(*words)
    found = {**vars(made.lora), **vars(made.trainer), **vars(made.dataset)}
    assert {key: found[key] for key in settings} == settings
    assert made.tracking.mode.value == "online", "else the sweep would not hear of it"


def test_a_search_becomes_one_of_wandbs():
    sweep = wandb_sweep.make_sweep(["sweep=tpe", "hydra.sweeper.n_trials=7", "model=tiny_random"])
    rate = sweep["parameters"]["trainer.learning_rate"]
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 7)
    assert rate == {"distribution": "log_uniform_values", "min": 5e-5, "max": 2e-3}
    words = started_by_an_agent(sweep, {"trainer.learning_rate": 1e-4, "lora.r": 32})
    check_command_line(ROOT / "conf", words, hardware=False)
    made = make_settings(*words)
    assert (made.lora.r, made.lora.lora_alpha, made.trainer.learning_rate) == (32, 32, 1e-4)
    assert wandb_sweep.make_sweep(["sweep=random"])["method"] == "random"


def test_the_project_stands_in_the_yaml_and_not_in_the_jobs(monkeypatch):
    assert wandb_sweep.make_sweep(["-m", "lora.r=4,8"])["project"] == "sft"
    sweep = wandb_sweep.make_sweep(["-m", "lora.r=4,8", "tracking.project=faq", "tracking.entity=team"])
    assert (sweep["project"], sweep["entity"]) == ("faq", "team") and not [w for w in sweep["command"] if "project" in w]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert wandb_sweep.make_sweep(["-m", "lora.r=4,8"])["project"] == "mine"


@pytest.mark.parametrize("argv, why", [
    (["model=tiny_random"], "No setting has several values"),
    (["-m", "lora.r=4,8", "tracking=none"], "does not hear"),
    (["-m", "lora.r=4,8", "lora.lora_alpha=4,8", "sweep.paired=[lora.r,lora.lora_alpha]"], "every combination"),
    (["method=best", "-m", "lora.r=4,8"], "no such method"),
    (["-m", "lora.rank=4,8"], "lora.rank"),
])  # fmt: skip
def test_what_an_agent_could_not_do_is_refused(argv, why, capsys):
    with pytest.raises(Refusal) as refusal:
        wandb_sweep.make_sweep(argv)
    assert why in str(refusal.value)
    assert wandb_sweep.main(argv) == 2 and capsys.readouterr().out == ""


@pytest.fixture
def fresh_client():
    """W&B reads its environment once a process: here anew, and again for the tests that follow."""
    client = importlib.import_module("wandb")
    client.teardown()
    yield
    client.teardown()
    gc.collect()  # the file of parameters, which it leaves open


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_an_agent_starts_joins_its_sweep(tmp_path, monkeypatch, fresh_client):
    given = tmp_path / "params.yaml"
    given.write_text("wandb_version: 1\ntrainer.learning_rate: {value: 0.001}\nlora.r: {value: 4}\n", encoding="utf-8")
    for name, value in {"SWEEP_ID": "sw33p", "RUN_ID": "ag3nt", "SWEEP_PARAM_PATH": str(given), "PROJECT": "theirs"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    settings = make_settings(*TRACKED, "trainer.learning_rate=0.001", "lora.r=4")
    tracker = make_trackers(settings)
    state = tracker.begin(settings, tmp_path, {"name": "tiny"}, "transformers")
    tracker.log({"step": 1, "eval_loss": 2.5})
    tracker.finish("finished", {"eval_loss": 2.5})
    made = read_back(tmp_path)
    assert (made["run"]["sweep_id"], made["run"]["run_id"], made["run"]["project"]) == ("sw33p", "ag3nt", "theirs")
    assert (state["id"], made["run"]["display_name"]) == ("ag3nt", "tiny_ag3nt")
    assert made["config"]["trainer.learning_rate"] == 0.001 and made["config"]["lora"]["r"] == 4
    assert made["summary"]["eval/loss"]["min"] == 2.5 and made["summary"]["eval_loss"] == 2.5
