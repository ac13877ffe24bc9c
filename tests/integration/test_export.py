"""Exports of a tiny run: every planted fault is caught, and nothing half-made is left. Those of GGUF: test_export_gguf.py."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sft.cli.export import main
from sft.errors import ExportError, Refusal
from sft.export import exporter, merge
from sft.lifecycle import run
from sft.runs.saved import settings_of
from tests import forked
from tests.conftest import ROOT, SMALL, make_settings

# A learning rate that moves the loss well beyond the tolerances, so that a lost adapter cannot pass.
LEARNT = ("trainer.max_steps=12", "trainer.learning_rate=2e-2", "trainer.warmup_steps=0", "trainer.eval_steps=6",
          "trainer.save_steps=6", "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1",
          "dataset.eval_fraction=0.25", "lora.r=16", "lora.lora_alpha=64")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run with merged_16bit exported, not to be changed: take a copy. With few tokens there is less to learn."""
    folder, few = tmp_path_factory.mktemp("trained") / "run", ("export.max_loss_increase=0.005", "trainer.learning_rate=1.4e-2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forked.popen)
        result = run(make_settings(*SMALL, *LEARNT, *few, "export=merged_16bit"), folder)
    assert (result.status, result.exit_code) == ("finished", 0)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def read(folder: Path) -> dict:
    return json.loads((folder / "export" / "verify.json").read_text(encoding="utf-8"))


def edit(file: Path, **changes) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def export(folder: Path, monkeypatch=None, fault=None, formats=("merged_16bit",), **options) -> dict:
    """Export again in this process; `fault(place)` spoils the merged folder between saving and proving it."""
    settings, _ = settings_of(folder)
    settings.export.formats = list(formats)
    for name, value in options.items():
        setattr(settings.export, name, value)
    if fault:
        original = merge.save

        def save(model, tokenizer, stop_ids, place, source=None):
            original(model, tokenizer, stop_ids, place, source)
            fault(place)

        monkeypatch.setattr(merge, "save", save)
    return exporter.export_run(folder, settings)


def test_the_merged_model_is_plain_and_stands_alone(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained / "export" / "merged_16bit"
    weights = load_file(folder / "model.safetensors")
    assert not [name for name in weights if "lora" in name] and {str(w.dtype) for w in weights.values()} == {"torch.bfloat16"}
    base = json.loads((trained / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained / "adapter").merge_and_unload()
    name = "model.layers.1.mlp.down_proj.weight"
    exact, merged = model.state_dict()[name], weights[name].float()
    assert float((exact - merged).abs().max()) <= float(exact.abs().max()) * 2**-8  # half a step of bfloat16
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 2 and settings["pad_token_id"] == 0


# ------------------------------------------------------------------------------------------- planted faults, torch


def lose_eos(place):
    edit(place / "generation_config.json", eos_token_id=None)


def lose_eos_token(place):
    edit(place / "tokenizer_config.json", eos_token="<|endoftext|>")


def pad_with_eos(place):
    edit(place / "tokenizer_config.json", pad_token="<|im_end|>")


def double_bos(place):
    """As tokenizers do that were saved with another setting: BOS before each text, twice."""
    file = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    file["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    (place / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")


def other_template(place):
    template = (place / "chat_template.jinja").read_text(encoding="utf-8")
    (place / "chat_template.jinja").write_text(template.replace("assistant", "model"), encoding="utf-8")


def no_template(place):
    (place / "chat_template.jinja").unlink()


def scale(place, factor):
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"] *= factor
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (lose_eos, "stop_tokens"),
        (lose_eos_token, "eos_token"),
        (pad_with_eos, "pad_token"),
        (double_bos, "prompt_tokens"),
        (other_template, "chat_template"),
        (no_template, "chat_template"),
        (lambda place: scale(place, 1.5), "loss"),
        (lambda place: shutil.copy(ROOT / "README.md", place / "model.safetensors"), "made"),
    ],
    ids=["eos", "eos_token", "pad", "bos", "template", "no_template", "scaled", "torn"],
)
def test_a_planted_fault_is_caught(copied, monkeypatch, fault, caught):
    report = export(copied, monkeypatch, fault)
    facts = report["artifacts"]["merged_16bit"]
    assert facts["status"] in ("failed", "error") and caught in facts["failed"]
    assert any("merged_16bit" in line for line in exporter.failures(report))


def test_an_adapter_that_was_not_merged_is_caught(copied, monkeypatch):
    monkeypatch.setattr(merge, "merge", lambda model: model.unload().bfloat16())
    assert export(copied)["artifacts"]["merged_16bit"]["failed"][0] == "loss"


def test_an_adapter_that_was_merged_at_another_scale_is_caught(copied, monkeypatch):
    original = merge.merge

    def scaled(model):
        from peft.tuners.lora import LoraLayer

        for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
            layer.scale_layer(2.0)
        return original(model)

    monkeypatch.setattr(merge, "merge", scaled)
    assert "loss" in export(copied)["artifacts"]["merged_16bit"]["failed"]


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_an_adapter_that_was_saved_wrong_is_caught(copied, factor):
    """What was trained is known from the training itself, not from the file."""
    file = copied / "adapter" / "adapter_model.safetensors"
    weights = {name: w * factor if "lora_B" in name else w for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert "loss" in export(copied)["artifacts"]["adapter"]["failed"]


# ------------------------------------------------------------------------------------------------- kinds of runs


@pytest.mark.parametrize(
    "overrides",
    [("lora=dora",), ("lora=rslora",), ("lora=none",), ("lora.bias=all", "lora.lora_dropout=0.1"),
     ("lora.modules_to_save=[embed_tokens,lm_head]",)],
    ids=["dora", "rslora", "full", "bias", "tied"],
)  # fmt: skip
def test_every_kind_of_training_merges(tmp_path, overrides):
    rate = ("trainer.learning_rate=1e-3",) if overrides == ("lora=none",) else ()
    lora = [] if overrides == ("lora=none",) else ["lora.r=16"]
    learnt = [o for o in LEARNT if not o.startswith("lora.")]
    settings = make_settings(*SMALL, *learnt, *overrides, *lora, *rate, "samples.num_held_out=1")
    folder = tmp_path / "run"
    assert run(settings, folder).exit_code == 0
    report = export(folder, num_prompts=2)
    assert report["artifacts"]["merged_16bit"]["status"] == "ok", report["artifacts"]


def test_a_checkpoint_is_exported_too(copied):
    checkpoint = copied / "checkpoints" / "checkpoint-6"
    assert main([f"run={checkpoint}", "export=merged_16bit"]) == 0
    found = read(copied)
    assert found["reference"]["weights"] == "checkpoints/checkpoint-6" and found["artifacts"]["merged_16bit"]["status"] == "ok"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["run=nowhere", "export=gguf"], "There is no such folder"),
        (["export=gguf"], "It names no run"),
        (["run={run}", "lora.r=8"], "export=gguf   for example"),
        (["run={run}"], "export=merged_16bit"),
        (["run={run}", "export=ggfu"], "export=gguf"),
        (["run={run}", "export=gguf", "export.gguf.quantizations=[q4_m]"], "export.gguf.quantizations=[q4_"),
        (["run={run}", "push=true"], "export.hub.repo=<user>/<name>"),
        (["run={run}/export/merged_16bit", "export=gguf"], "neither a run nor a checkpoint"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(trained, options, told, capsys):
    assert main([option.replace("{run}", str(trained)) for option in options]) == 2
    assert told in capsys.readouterr().err


def test_a_failed_export_shows_in_the_exit_code_and_keeps_the_run(tmp_path, forked_children):
    """With a limit that nothing keeps: on random weights rounding costs next to nothing."""
    settings = make_settings(*SMALL, "trainer=debug", "export=merged_4bit")
    settings.export.max_loss_increase = -1.0
    result = run(settings, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (result.status, result.exit_code) == ("finished", 1)
    assert record["status"] == "finished" and "merged_4bit: loss: expected" in record["reason"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_is_interrupted_in_its_export_makes_it_when_it_goes_on(tmp_path, monkeypatch, forked_children):
    class Exporting:
        """An export that is at work when the signal comes."""

        returncode = None

        def poll(self):
            return self.returncode

        def wait(self, timeout):
            pass

        def terminate(self):
            self.returncode = -signal.SIGTERM

    def start(command, *args, **kwargs):
        if "sft.export" not in command:
            return started(command, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return Exporting()

    started = subprocess.Popen
    settings = make_settings(*SMALL, "trainer=debug", "export=merged_16bit")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        result = run(settings, tmp_path / "run")
    assert (result.status, result.exit_code) == ("stopped", 130)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["reason"] == "trained; SIGTERM ended the export" and record["metrics"]["kept_step"] > 0
    weights = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert run(settings, tmp_path / "run").exit_code == 0
    assert read(tmp_path / "run")["artifacts"]["merged_16bit"]["status"] == "ok"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_that_the_clock_stops_still_gets_its_exports(tmp_path, monkeypatch):
    """The export is made in this process; that it has one of its own is seen where all formats are made."""

    class Exported:
        def __init__(self, command, *args, **kwargs):
            folder = Path(command[-1])
            report = exporter.export_run(folder, settings_of(folder)[0])
            self.returncode = 1 if exporter.failures(report) else 0

        def poll(self):
            return self.returncode

    started = subprocess.Popen

    def start(command, *args, **kwargs):
        return (Exported if "sft.export" in command else started)(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", start)
    limited = ("trainer.max_steps=50", "trainer.max_hours=1e-9", "export=merged_16bit")
    result = run(make_settings(*SMALL, *LEARNT[1:], *limited), tmp_path / "run")
    assert (result.status, result.exit_code) == ("stopped", 0)
    assert read(tmp_path / "run")["artifacts"]["merged_16bit"]["status"] == "ok"


def test_a_full_disk_is_told_before_anything_is_made(copied, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(Refusal, match="GiB are free"):
        export(copied)


@pytest.mark.parametrize(("keys", "told"), [
    ({"megatron_core": "a_strangers_module"}, "asks for megatron_core"), ({"megatron_config": {}}, "asks for megatron_config"),
    ({"auto_mapping": {"parent_library": "queue"}}, "asks for auto_mapping"), ({"colour": "red"}, "does not know colour"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"), ({"r": "x"}, "PEFT cannot put adapter/ on the model"),
    ({"target_modules": ["nothing"]}, "PEFT cannot put adapter/ on the model"),
])  # fmt: skip
def test_an_adapter_config_that_peft_would_obey_or_not_know_is_refused_by_name(copied, capfd, keys, told):
    from sft.cli import talk as chat

    file = copied / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    for program in (lambda: main([f"run={copied}", "export=adapter"]), lambda: chat.main([f"run={copied}", "prompt=hello"])):
        assert program() == 2
        text = capfd.readouterr().err
        assert f"run={copied}" in text and told in text and "Traceback" not in text


def test_an_adapter_whose_weights_were_cut_off_is_refused_by_name(copied, capfd):
    file = copied / "adapter" / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    assert main([f"run={copied}", "export=adapter"]) == 2
    assert "adapter_model.safetensors" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "keys", "told"), [
    ("config.json", {"attn_implementation": "attacker/kernel"}, "attacker/kernel"),
    ("config.json", {"hidden_size": 48}, "hidden_size is 48"),
    ("model.safetensors.index.json", {"weight_map": {"a": "../adapter/adapter_model.safetensors"}}, "own folder"),
])  # fmt: skip
def test_a_merged_folder_is_checked_before_a_chat_loads_it(copied, capfd, name, keys, told):
    from sft.cli import talk as chat

    file = copied / "export" / "merged_16bit" / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | keys))
    assert chat.main([f"run={file.parent}", "prompt=hello"]) == 2
    text = capfd.readouterr().err
    assert f"{file.parent}: {name}" in text and told in text and "hint: export it again" in text


def test_a_run_without_its_rows_says_so(copied):
    (copied / "held_out.jsonl").unlink()
    with pytest.raises(ExportError, match="held_out"):
        export(copied)
