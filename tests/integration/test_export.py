"""Exports of a tiny run: every format holds, every planted fault is caught, and nothing half-made is left."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.export import main
from sft.errors import ExportError, Refusal
from sft.export import exporter, gguf, merge
from sft.run import run
from sft.runs.saved import settings_of
from sft.storage import jsonio
from tests import forked
from tests.conftest import ROOT, SMALL, make_settings
from tests.faults.fault_campaign import export_hashes

# A learning rate that moves the loss well beyond the tolerances, so that a lost adapter cannot pass.
LEARNT = ("trainer.max_steps=12", "trainer.learning_rate=2e-2", "trainer.warmup_steps=0", "trainer.eval_steps=6",
          "trainer.save_steps=6", "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1",
          "dataset.eval_fraction=0.25", "lora.r=16", "lora.lora_alpha=64")  # fmt: skip
needs_gguf = pytest.mark.skipif(bool(gguf.missing_parts()), reason=f"llama.cpp's parts are not installed: {gguf.INSTALL}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run with merged_16bit and f16 exported, not to be changed: take a copy."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    gguf_files = ("export.gguf.quantizations=[f16,q8_0,q4_k_m]", "export.gguf.adapter=true")
    result = run(make_settings(*SMALL, *LEARNT, "export=all", *gguf_files), folder)
    assert (result.status, result.exit_code) == ("finished", 0)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def converted(trained, monkeypatch):
    """In place of llama.cpp's converter, a process a call: the file that it has made of the same weights before."""

    def convert(merged, target, kind="f16"):
        assert kind == "f16"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trained / "export" / "gguf" / "model-f16.gguf", target)

    monkeypatch.setattr(gguf, "convert", convert)


@pytest.fixture
def forked_export(monkeypatch):
    """The process of a run's export, forked from one that has imported the libraries."""
    monkeypatch.setattr(subprocess, "Popen", forked.popen)


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


@needs_gguf
def test_every_format_holds_what_was_trained(trained):
    found = read(trained)
    assert set(found["artifacts"]) == {
        "adapter",
        "merged_16bit",
        "merged_4bit",
        "gguf/f16",
        "gguf/q8_0",
        "gguf/q4_k_m",
        "gguf/adapter",
    }
    assert all(facts["status"] == "ok" and facts["failed"] == [] for facts in found["artifacts"].values())
    record = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    assert abs(found["reference"]["loss"] - record["metrics"]["proof_loss"]) < 1e-4
    for name in ("adapter", "merged_16bit", "gguf/f16"):
        assert abs(found["artifacts"][name]["loss_increase"]) < 1e-3, name
    moved = record["metrics"]["eval_loss_start"] - record["metrics"]["eval_loss"]
    assert moved > 0.05, "the training moved nothing, so that this test could not fail"
    for name in ("adapter", "merged_16bit", "merged_4bit", "gguf"):
        assert (trained / "export" / name / "README.md").is_file(), name
        assert {*found["files"][name], "README.md"} == {p.name for p in (trained / "export" / name).iterdir()}, name
    assert not list((trained / "export").rglob(".*"))
    assert "<|im_start|>" in (trained / "export/gguf/Modelfile.q8_0").read_text(encoding="utf-8")
    assert record["artifacts"]["export/gguf/q8_0"] == "export/gguf/model-q8_0.gguf"


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


@needs_gguf
def test_the_gguf_adapter_on_the_base_is_the_merged_model(trained, tmp_path):
    """base + alpha / r * B A, as llama.cpp computes it, for a layer whose rows llama.cpp reorders and one that it does not."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((trained / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    gguf.convert(tmp_path / "base", tmp_path / "base.gguf", "f32")
    base, merged, adapter = (
        {t.name: torch.from_numpy(t.data.copy()).float() for t in GGUFReader(file).tensors}
        for file in (tmp_path / "base.gguf", trained / "export/gguf/model-f16.gguf", trained / "export/gguf/adapter.gguf")
    )
    alpha = GGUFReader(trained / "export/gguf/adapter.gguf").fields["adapter.lora.alpha"].contents()
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_down.weight"):
        a, b = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
        update = alpha / len(a) * b @ a
        assert float(update.abs().max()) > 0.01  # beyond the rounding
        assert torch.allclose(base[name] + update, merged[name], atol=2e-3), name


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


# -------------------------------------------------------------------------------------------- planted faults, GGUF


@needs_gguf
@pytest.mark.parametrize(
    ("key", "value", "caught"),
    [
        ("tokenizer.ggml.eos_token_id", 0, "eos_token"),
        ("tokenizer.ggml.padding_token_id", 2, "pad_token"),
        ("tokenizer.ggml.add_bos_token", True, "prompt_tokens"),
        ("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}", "chat_template"),
    ],
)
def test_a_fault_in_a_gguf_file_is_caught(copied, monkeypatch, converted, key, value, caught):
    original = gguf.convert

    def convert(merged, target, kind="f16"):
        original(merged, target, kind)
        rewrite(target, key, value)

    monkeypatch.setattr(gguf, "convert", convert)
    settings, _ = settings_of(copied)
    settings.export.formats, settings.export.gguf.quantizations = ["gguf"], ["f16"]
    facts = exporter.export_run(copied, settings)["artifacts"]["gguf/f16"]
    assert facts["status"] == "failed" and caught in facts["failed"], facts["checks"]


def rewrite(file: Path, key: str, value) -> None:
    """Set one field of a GGUF file: every other field and every tensor is copied."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(file)
    writer = GGUFWriter(file.with_suffix(".new"), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name == key:
            continue
        kinds = field.types
        writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None)
    kind = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}[type(value)]
    writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


@needs_gguf
def test_a_quantisation_that_costs_too_much_fails(copied, converted):
    settings, _ = settings_of(copied)
    settings.export.formats, settings.export.gguf.quantizations = ["gguf"], ["q2_k"]
    settings.export.max_loss_increase = -1.0  # a limit that nothing keeps; on random weights rounding costs next to nothing
    report = exporter.export_run(copied, settings)
    facts = report["artifacts"]["gguf/q2_k"]
    assert facts["loss_increase"] > -1.0 and facts["failed"] == ["loss"]
    assert {"gguf/f16", "merged_16bit"} <= set(read(copied)["artifacts"])  # of the export before
    assert not (copied / "export" / ".merged_16bit").exists()


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


@pytest.mark.parametrize("targets", ["q_proj,embed_tokens", "q_proj,lm_head"])
def test_an_adapter_on_one_end_of_tied_embeddings_is_merged_into_that_end(tmp_path, targets):
    """tiny_random ties them: added to the shared weight, the one end's update would reach the other."""
    rate = ("trainer.learning_rate=0.05", "samples.num_held_out=1", f"lora.target_modules=[{targets}]")
    settings = make_settings(*SMALL, *[o for o in LEARNT if "learning_rate" not in o], *rate)
    assert run(settings, tmp_path / "run").exit_code == 0
    kinds = ("merged_16bit", "merged_4bit", *([] if gguf.missing_parts() else ["gguf"]))
    settings, _ = settings_of(tmp_path / "run")
    settings.export.gguf.quantizations, settings.export.gguf.adapter = ["f16"], True
    settings.export.formats, settings.export.num_prompts = list(kinds), 2
    found = exporter.export_run(tmp_path / "run", settings)["artifacts"]
    made = {name: facts["status"] for name, facts in found.items()}
    adapter = made.pop("gguf/adapter", "error")
    assert set(made.values()) == {"ok"}, found
    assert adapter == "error", "llama.cpp keeps a tied weight once, so that its adapter would act on both ends"
    config = json.loads((tmp_path / "run/export/merged_16bit/config.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "run/export/merged_16bit/model.safetensors")
    assert config["tie_word_embeddings"] is False
    away = (weights["lm_head.weight"].float() - weights["model.embed_tokens.weight"].float()).norm()
    assert away > 0.1 * weights["lm_head.weight"].float().norm()


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


def test_a_failed_export_shows_in_the_exit_code_and_keeps_the_run(tmp_path, forked_export):
    """With a limit that nothing keeps: on random weights rounding costs next to nothing."""
    settings = make_settings(*SMALL, "trainer=debug", "export=merged_4bit")
    settings.export.max_loss_increase = -1.0
    result = run(settings, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (result.status, result.exit_code) == ("finished", 1)
    assert record["status"] == "finished" and "merged_4bit: loss: expected" in record["reason"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_is_interrupted_in_its_export_makes_it_when_it_goes_on(tmp_path, monkeypatch, forked_export):
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


@contextlib.contextmanager
def full_disk():
    """No file grows beyond 100 kB in this process and those that it starts: every write of weights fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@needs_gguf
@pytest.mark.parametrize(
    ("module", "step", "words"),
    [
        (merge, "save", ["export=merged_16bit"]),
        (merge, "save_4bit", ["export=merged_4bit"]),
        (gguf, "convert", ["export.formats=[merged_16bit,gguf]", "export.gguf.quantizations=[f16]"]),
        (gguf, "quantise", ["export.formats=[merged_16bit,gguf]", "export.gguf.quantizations=[q8_0]"]),
        (
            gguf,
            "write_adapter",
            ["export.formats=[merged_16bit,gguf]", "export.gguf.quantizations=[f16]", "export.gguf.adapter=true"],
        ),
        (jsonio, "write_json", ["export=adapter"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_disk_that_fills_up_ends_an_export_in_a_line_and_the_next_one_completes(
    trained, copied, monkeypatch, capfd, request, module, step, words
):
    """What is there under its own name is whole; the rest is absent, and nothing hidden is left. The converter runs where it
    is what the disk stops, and once more after it; the steps after it are given the file that it has made.
    """
    shutil.rmtree(copied / "export")
    if step in ("quantise", "write_adapter"):
        request.getfixturevalue("converted")
    original = getattr(module, step)

    def on_a_full_disk(*args, **options):
        if step == "write_json":  # smaller than the limit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with full_disk():
            return original(*args, **options)

    monkeypatch.setattr(module, step, on_a_full_disk)
    assert main([f"run={copied}", *words]) == 1
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("Failed: ")]
    reasons = ("too large", "No space left", "GiB of the disk are free", "as on a full disk")
    assert len(lines) == 1 and any(reason in lines[0] for reason in reasons), told[-3000:]
    assert "Traceback" not in told
    whole = export_hashes(trained)
    files = {name: value for name, value in export_hashes(copied).items() if name.startswith("export/")}
    assert files.items() <= whole.items()
    assert not [p for p in (copied / "export").rglob("*") if p.name.startswith(".")]

    monkeypatch.setattr(module, step, original)
    assert main([f"run={copied}", *words]) == 0
    assert export_hashes(copied).items() <= whole.items() and len(export_hashes(copied)) > len(files)


@pytest.mark.parametrize(("keys", "told"), [
    ({"megatron_core": "a_strangers_module"}, "asks for megatron_core"), ({"megatron_config": {}}, "asks for megatron_config"),
    ({"auto_mapping": {"parent_library": "queue"}}, "asks for auto_mapping"), ({"colour": "red"}, "does not know colour"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"), ({"r": "x"}, "PEFT cannot put adapter/ on the model"),
    ({"target_modules": ["nothing"]}, "PEFT cannot put adapter/ on the model"),
])  # fmt: skip
def test_an_adapter_config_that_peft_would_obey_or_not_know_is_refused_by_name(copied, capfd, keys, told):
    from scripts import chat

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
    from scripts import chat

    file = copied / "export" / "merged_16bit" / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | keys))
    assert chat.main([f"run={file.parent}", "prompt=hello"]) == 2
    text = capfd.readouterr().err
    assert f"{file.parent}: {name}" in text and told in text and "hint: export it again" in text


def test_a_run_without_its_rows_says_so(copied):
    (copied / "held_out.jsonl").unlink()
    with pytest.raises(ExportError, match="held_out"):
        export(copied)


def test_a_quantised_file_that_cannot_be_read_back_is_none(tmp_path):
    """llama.cpp says that all went well where its last write, of the file's head, failed."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "sft/export")!r})
import llama_cpp
llama_cpp.cpp.model_quantize = lambda source, target, params: open(target, "wb").write(bytes(4096))
llama_cpp.quantise({{"source": "none", "target": {str(tmp_path / "q.gguf")!r}, "kind": 7}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be read back" in done.stderr
