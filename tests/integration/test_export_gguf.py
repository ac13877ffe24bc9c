"""Exports of all formats, with llama.cpp's: every one holds, every planted fault is caught, and nothing half-made is left."""

import contextlib
import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sft.cli.export import main
from sft.export import exporter, gguf, merge
from sft.lifecycle import run
from sft.runs.saved import settings_of
from sft.storage import jsonio
from tests import forked
from tests.conftest import ROOT, SMALL, make_settings
from tests.faults.fault_campaign import export_hashes
from tests.integration.test_export import LEARNT, copied, read  # noqa: F401

pytestmark = pytest.mark.usefixtures("all_tokens", "forked_children")
needs_gguf = pytest.mark.skipif(bool(gguf.missing_parts()), reason=f"llama.cpp's parts are not installed: {gguf.INSTALL}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, all_tokens):
    """One finished run with all formats exported, not to be changed: take a copy."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    gguf_files = ("export.gguf.quantizations=[f16,q8_0,q4_k_m]", "export.gguf.adapter=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subprocess.Popen", forked.popen)
        result = run(make_settings(*SMALL, *LEARNT, "export=all", *gguf_files), folder)
    assert (result.status, result.exit_code) == ("finished", 0)
    return folder


@pytest.fixture
def converted(trained, monkeypatch):
    """In place of llama.cpp's converter, a process a call: the file that it has made of the same weights before."""

    def convert(merged, target, kind="f16"):
        assert kind == "f16"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trained / "export" / "gguf" / "model-f16.gguf", target)

    monkeypatch.setattr(gguf, "convert", convert)


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


@needs_gguf
def test_the_gguf_adapter_on_the_base_is_the_merged_model(trained, tmp_path, monkeypatch):
    """base + alpha / r * B A, as llama.cpp computes it, for a layer whose rows llama.cpp reorders and one that it does not. The
    converter is started as always, not forked.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((trained / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    monkeypatch.setattr("subprocess.Popen", forked.started)
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
def test_a_fault_in_a_gguf_file_is_caught(copied, monkeypatch, converted, key, value, caught):  # noqa: F811
    original = gguf.convert

    def convert(merged, target, kind="f16"):
        original(merged, target, kind)
        rewrite(target, key, value)

    monkeypatch.setattr(gguf, "convert", convert)
    settings, _ = settings_of(copied)
    settings.export.formats, settings.export.gguf.quantizations, settings.export.gguf.adapter = ["gguf"], ["f16"], False
    facts = exporter.export_run(copied, settings)["artifacts"]["gguf/f16"]
    assert facts["status"] == "failed" and caught in facts["failed"], facts["checks"]


def rewrite(file: Path, key: str, value) -> None:
    """Set one field of a GGUF file where it stands; a text that is shorter than the one there gets a comment for the rest."""
    content = bytearray(file.read_bytes())
    name = struct.pack("<Q", len(key)) + key.encode()
    assert content.count(name) == 1
    at = content.index(name) + len(name) + 4  # the number of its type
    new = bytes([value]) if isinstance(value, bool) else struct.pack("<I", value) if isinstance(value, int) else b""
    if isinstance(value, str):
        at, length = at + 8, struct.unpack_from("<Q", content, at)[0]
        new = value.encode() + b"{#" + b" " * (length - len(value.encode()) - 4) + b"#}"
        assert len(new) == length
    content[at : at + len(new)] = new
    file.write_bytes(content)


@needs_gguf
def test_a_quantisation_that_costs_too_much_fails(copied, converted):  # noqa: F811
    settings, _ = settings_of(copied)
    settings.export.formats, settings.export.gguf.quantizations, settings.export.gguf.adapter = ["gguf"], ["q2_k"], False
    settings.export.max_loss_increase = -1.0  # a limit that nothing keeps; on random weights rounding costs next to nothing
    report = exporter.export_run(copied, settings)
    facts = report["artifacts"]["gguf/q2_k"]
    assert facts["loss_increase"] > -1.0 and facts["failed"] == ["loss"]
    assert any("gguf/q2_k" in line and "'export.gguf.quantizations=[q8_0]'" in line for line in exporter.failures(report))
    assert {"gguf/f16", "merged_16bit"} <= set(read(copied)["artifacts"])  # of the export before
    assert not (copied / "export" / ".merged_16bit").exists()


@pytest.mark.parametrize("targets", ["q_proj,embed_tokens", "q_proj,lm_head"])
def test_an_adapter_on_one_end_of_tied_embeddings_is_merged_into_that_end(tmp_path, targets):
    """tiny_random ties them: added to the shared weight, the one end's update would reach the other."""
    few = ("trainer.max_steps=6", "trainer.learning_rate=0.02", "samples.num_held_out=1", f"lora.target_modules=[{targets}]")
    settings = make_settings(*SMALL, *LEARNT, *few)
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


ALONE = "export.gguf.adapter=false"


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
        (gguf, "convert", ["export.formats=[merged_16bit,gguf]", "export.gguf.quantizations=[f16]", ALONE]),
        (gguf, "quantise", ["export.formats=[merged_16bit,gguf]", "export.gguf.quantizations=[q8_0]", ALONE]),
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
    trained,
    copied,  # noqa: F811
    monkeypatch,
    capfd,
    request,
    module,
    step,
    words,
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
    words = [*words, "export.num_prompts=1"]  # the disk is filled by files, not by what is compared
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
