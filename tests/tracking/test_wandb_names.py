"""What a run of ours is called in W&B, read back from the client's own offline files: names, config, summary, ending."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.config.method import MethodFacts
from sft.config.naming import tags_of
from sft.lifecycle import run
from sft.runs.record import Context
from sft.tracking.base import make_trackers, tags_to_track
from sft.tracking.names import define_metrics, name_metric, name_metrics
from tests.conftest import SMALL, make_settings

TRACKED = (*SMALL, "trainer=debug", "tracking=wandb", "tracking.mode=offline")
CHOICES = {"model": "tiny_random", "trainer": "debug", "lora": "default", "tracking": "wandb"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_MODE"]:
        monkeypatch.delenv(name)


def read_back(folder: Path) -> dict:
    """What the newest offline run in a folder holds: its record, config, lines, summary, artifacts and alerts."""
    binary = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", binary]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found: dict = {"config": {}, "history": [], "summary": {}, "artifact": [], "alert": [], "metric": []}
    for record in (json.loads(line) for line in shown.splitlines() if line.startswith("{")):
        kind = record["type"]
        content = record.get(kind)
        if kind == "run":
            found |= {"run": content}
            found["config"] |= content["config"]["update"]
        elif kind in ("config", "summary"):
            found[kind] |= content["update"]
        elif kind in ("artifact", "alert", "metric"):
            found[kind].append(content)
        elif kind == "history":
            found[kind].append(content["item"])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, read back, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    context = Context("tiny", "python train.py model=tiny_random", (), tags_of(CHOICES), choices=CHOICES)
    settings = make_settings(*TRACKED, "tracking.log_adapter=true", "tracking.alert=true", "tracking.group=faq")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_NOTES"):
            patch.delenv(name, raising=False)
        assert run(settings, folder, context).status == "finished"
    return folder, read_back(folder)


def test_curves_have_the_names_of_transformers_and_trl(finished):
    folder, made = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("loss" in line for line in lines) and not any("train/loss" in line for line in lines), "the folder's keys stay"
    for ours, theirs in {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm",
                         "eval_loss": "eval/loss", "eos_share": "samples/eos_share", "epoch": "train/epoch",
                         "memory_gib": "perf/memory_gib"}.items():  # fmt: skip
        wanted = [(line["step"], line[ours]) for line in lines if ours in line]
        assert [(line["train/global_step"], line[theirs]) for line in made["history"] if theirs in line] == wanted, ours
    assert not {"loss", "step", "epoch", "eval_loss"} & {key for line in made["history"] for key in line}


def test_every_line_has_the_tokens_so_far(finished):
    folder, made = finished
    told = [line["train/num_tokens"] for line in made["history"]]
    assert told == sorted(told) and told[0] == 0 < told[-1]
    assert told[-1] == json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]["tokens"]


def test_the_held_out_loss_has_its_minimum_and_the_axis_is_the_step(finished):
    _, made = finished
    losses = [line["eval/loss"] for line in made["history"] if "eval/loss" in line]
    assert made["summary"]["eval/loss"] == pytest.approx({"min": min(losses), "last": losses[-1]})
    assert {"glob_name": "*", "step_metric": "train/global_step"}.items() <= made["metric"][1].items()
    assert made["metric"][2]["step_metric"] == "train/global_step" and made["metric"][2]["name"] == "eval/loss"


def test_the_config_says_where_and_of_what_the_run_is(finished):
    folder, made = finished
    config, record = made["config"], json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert config["run"] == {"folder": str(folder), "command": "python train.py model=tiny_random"}
    assert config["choices"] == CHOICES == record["choices"] and config["backend"] == "transformers"
    assert config["data"]["hash"] == record["data"]["hash"] and config["data"]["train_rows"] == record["data"]["train_rows"]
    assert config["git_commit"] == record["git_commit"] and config["versions"]["torch"] == record["versions"]["torch"]
    assert config["parameters"] == record["model"]["parameters"] > config["trainable_parameters"] > 0
    assert config["trainer"]["learning_rate"] == record["settings"]["trainer"]["learning_rate"], "and the settings as they were"


def test_the_run_is_told_apart_and_found_again(finished):
    folder, made = finished
    entry = made["run"]
    assert entry["display_name"] == f"tiny_{entry['run_id']}" and entry["job_type"] == "train" and entry["run_group"] == "faq"
    assert entry["notes"] == "python train.py model=tiny_random"
    assert set(entry["tags"]) == {"tiny_random", "debug", "transformers"}, "no wandb and no default"
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["tracking"]["group"] == "faq"


def test_the_end_has_the_status_the_adapter_and_the_alert_that_was_asked_for(finished):
    folder, made = finished
    assert made["summary"]["status"] == "finished" and made["summary"]["reason"] is None
    assert made["summary"]["eval_loss"] == json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]["eval_loss"]
    (adapter,) = [artifact for artifact in made["artifact"] if artifact["type"] == "model"]
    sent = {entry["path"]: entry["local_path"] for entry in adapter["manifest"]["contents"]}
    assert set(sent) == {path.name for path in (folder / "adapter").iterdir()}
    assert sent["adapter_model.safetensors"] == str(folder / "adapter/adapter_model.safetensors")
    assert json.loads(adapter["metadata"])["eval_loss"] == made["summary"]["eval_loss"]
    (alert,) = made["alert"]
    assert alert["title"].endswith(": finished") and alert["text"].startswith("held-out loss ") and alert["level"] == "INFO"


def test_samples_are_a_table_with_question_prompt_and_source(finished):
    folder, _ = finished
    tables = [
        json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("wandb/offline-run-*/files/media/table/*.json")
    ]
    rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    asked = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("step", "prompt_id", "source", "question", "answer", "tokens")
    wanted = [(s["step"], s["index"], s["source"], s["question"], s["completion"], len(s["completion_ids"])) for s in asked]
    assert sorted(tuple(row[key] for key in keys) for row in rows) == sorted(wanted)
    assert all("<|im_start|>" not in row["question"] for row in rows)


def test_a_run_whose_model_cannot_be_loaded_is_in_wandb_with_the_reason(small, tmp_path, monkeypatch):
    from sft.model import warm_cache

    def out_of_memory(*args):
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr(warm_cache, "load_model", out_of_memory)
    assert run(make_settings(*TRACKED, "tracking.alert=true"), tmp_path).status == "failed"
    made = read_back(tmp_path)
    assert made["summary"]["status"] == "failed" and made["summary"]["reason"] == "RuntimeError: CUDA out of memory"
    assert [(alert["level"], alert["text"]) for alert in made["alert"]] == [("ERROR", "RuntimeError: CUDA out of memory")]
    assert made["history"] == [] and "parameters" not in made["config"]


def test_tokens_go_on_from_those_of_the_lines_before_a_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 40}\n{"step": 1, "eval_loss": 2}\n', encoding="utf-8")
    settings = make_settings(*TRACKED)
    tracker = make_trackers(settings)
    tracker.begin(settings, tmp_path, {}, "transformers")
    tracker.log({"step": 1, "eos_share": 0.5})
    tracker.finish("stopped", {}, "SIGINT at step 1")
    made = read_back(tmp_path)
    assert made["history"][0]["train/num_tokens"] == 40 and made["summary"]["reason"] == "SIGINT at step 1"


def test_two_runs_of_the_same_model_and_data_differ_in_name(tmp_path):
    settings, names = make_settings(*TRACKED), set()
    for number in range(2):
        tracker = make_trackers(settings)
        folder = tmp_path / str(number)
        folder.mkdir()
        tracker.begin(settings, folder, {"name": "tiny"}, "transformers")
        tracker.finish("finished", {})
        names.add(read_back(folder)["run"]["display_name"])
    assert len(names) == 2 and all(name.startswith("tiny_") for name in names)


def test_tags_have_the_gpu_and_those_of_the_record():
    assert tags_to_track({"tags": [], "hardware": {"gpu": "NVIDIA H100"}}, "unsloth") == ["unsloth", "NVIDIA H100"]
    assert tags_to_track({"tags": ["mine"]}, "transformers") == ["mine", "transformers"]


def test_a_metric_without_a_name_of_its_own_is_one_of_training_or_evaluation():
    assert name_metric("bad_steps") == "train/bad_steps" and name_metric("eval_accuracy") == "eval/accuracy"
    assert name_metrics({"step": 3, "tokens": 9}, 5) == {"train/num_tokens": 9, "train/global_step": 3}


@pytest.mark.filterwarnings("ignore:.*Pydantic:DeprecationWarning", "ignore:Pydantic V1 style:DeprecationWarning")
def test_every_panel_of_a_workspace_shows_something_that_the_run_has(finished, capsys):
    pytest.importorskip("wandb_workspaces")
    from scripts import wandb_workspace

    folder, made = finished
    assert wandb_workspace.main(["--dry-run", f"run={folder}"]) == 0
    text = capsys.readouterr().out
    assert f'"value": "{made["run"]["run_id"]}"' in text, "this run alone"
    logged = {key for line in made["history"] for key in line}
    for section in json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            assert {*config.get("metrics", []), config.get("xAxis") or "train/global_step"} <= logged, config
    assert "lora" in made["config"]["choices"], "and the axis choices.lora of a sweep over lora"
    (folder / "nothing").mkdir()
    assert wandb_workspace.main(["--dry-run", f"run={folder / 'nothing'}"]) == 2
    assert "No W&B run was begun there" in capsys.readouterr().err


def test_what_another_method_is_ranked_by_has_its_best_value_as_well():
    class Defined(list):
        def define_metric(self, name, step_metric=None, summary=None):
            self.append((name, summary))

    run = Defined()
    define_metrics(run, MethodFacts("preference", (), "eval_accuracy", greater_is_better=True))
    assert run[-2:] == [("eval/loss", "min,last"), ("eval/accuracy", "max,last")]
