"""The model families that people train, each as a tiny random twin of its own architecture."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from scripts import families_table
from sft.errors import ExportError, Refusal
from sft.export import gguf
from sft.lifecycle import run
from sft.model import builtin, padding_free
from sft.plan import families
from sft.storage.jsonio import read_json
from sft.training import checkpoint
from tests.conftest import ROOT, make_settings
from tests.faults.fault_campaign import compare, write_rows

pytestmark = pytest.mark.usefixtures("forked_children")

JOB = ("tracking=none", "dataset=local", "samples.max_new_tokens=4", "samples.num_held_out=2", "trainer=debug",
       "trainer.per_device_train_batch_size=2", "trainer.learning_rate=1e-2", "trainer.warmup_steps=0")  # fmt: skip

HEADS = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
STATES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
LAYERS = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
# llama.cpp takes five layers that slide for each that does not, and the scale of the head's width.
GEMMA3 = {**HEADS, "sliding_window": 64, "num_hidden_layers": 6, "query_pre_attn_scalar": 16}
GEMMA4 = {**HEADS, "global_head_dim": 32, "sliding_window": 64, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
          "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip

TWINS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": HEADS,
    "smollm3": {},
    "granite": {},
    "phi3": {},
    "ministral3": HEADS,
    "gemma3_text": GEMMA3,
    "gemma3": {},
    "gemma4_text": GEMMA4,
    "gemma4": {},
    "qwen3_5": {},
    "qwen3_5_text": {**STATES, **LAYERS, "head_dim": 256},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_moe": {**HEADS, **EXPERTS, "num_experts": 4},
    "gpt_oss": {**HEADS, **EXPERTS, "num_local_experts": 4, "sliding_window": 64},
}  # fmt: skip
"""By `model_type`, what a family's config needs beside the sizes that all share."""

TEXTS = {"gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text"}
"""Families whose part for text is a family of its own and has a twin too."""

GGUF = [TEXTS.get(family, family) for family, shown in families_table.FAMILIES.items() if shown.gguf == families_table.PROVEN]
"""Families whose GGUF files are made and proven in test_families_gguf.py."""


@functools.cache
def make_twin(family: str, place: Path, words: Path | None = None) -> Path:
    """A random model of this family in two layers, with the tokenizer in `words`, else with that of tiny_random."""
    tokenizer = AutoTokenizer.from_pretrained(words or builtin.local_model(builtin.TINY_RANDOM))
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=2048)  # fmt: skip
    if family == "gemma4_text":
        sizes |= {"vocab_size_per_layer_input": len(tokenizer)}
    config = CONFIG_MAPPING[family](**{**sizes, **ends, **TWINS[family]})
    if family == "gemma3":  # as on the hub, with a part for images beside that for text
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
        text = {**sizes, **ends, **GEMMA3}
        config = CONFIG_MAPPING[family](text_config=text, vision_config=small, mm_tokens_per_image=4, **ends)
    if family == "gemma4":
        small = {**HEADS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "num_key_value_heads": 2}  # fmt: skip
        text = {**sizes, **ends, **GEMMA4, "vocab_size_per_layer_input": len(tokenizer)}
        config = CONFIG_MAPPING[family](text_config=text, vision_config=small, **ends)
    if family == "qwen3_5":
        small = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
        text = {**sizes, **ends, **TWINS["qwen3_5_text"]}
        config = CONFIG_MAPPING[family](text_config=text, vision_config=small, **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = AutoModelForImageTextToText if family in ("gemma3", "gemma4", "qwen3_5") else AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 3_000_000 or len(tokenizer) > 10_000
    model.save_pretrained(place / family)
    tokenizer.save_pretrained(place / family)
    if family == "phi3":  # as Phi-4's on the hub
        config = place / family / "tokenizer_config.json"
        config.write_text(json.dumps({**read_json(config), "tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8")
    return place / family


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """`twin("lfm2")`: the folder of a tiny random model of this family."""
    return functools.partial(make_twin, place=tmp_path_factory.mktemp("twins"))


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    monkeypatch.setattr("sft.report.page.bundled_charts", lambda: "")


def train(folder: Path, *overrides: str) -> Path:
    result = run(make_settings(*JOB, *overrides), folder)
    assert (result.status, result.exit_code) == ("finished", 0), read_json(folder / "run.json").get("reason")
    return folder


def adapted(folder: Path) -> set[str]:
    return set(read_json(folder / "adapter" / "adapter_config.json")["target_modules"])


@pytest.mark.parametrize("family", families_table.FAMILIES)
def test_a_family_trains_and_its_merged_model_is_proven(family, twin, tmp_path):
    job = (f"model.name={twin(family)}", write_rows(tmp_path), "export=merged_16bit")
    folder = train(tmp_path / "run", *job, "trainer.max_steps=3", "trainer.save_steps=3")
    own = families.OWN.get(family, families.DEFAULT)
    assert read_json(folder / "run.json")["plan"]["target_modules"] == (
        None if own == families.DEFAULT else own)  # fmt: skip
    assert {name.rpartition(".")[2] for name in adapted(folder)} == {*(families.DEFAULT if own == families.TEXT_PART else own)}
    speed = read_json(folder / "run.json")["speed"]
    why = families_table.FAMILIES[family].padded
    assert speed["padding_free"] == (not why) and speed["why_not"].endswith(why)
    lines = [line["text"] for line in read_json(folder / "preflight.json")["checks"] if line["part"] == "Plan"]
    assert any(line.startswith(f"adapters on {', '.join(own)}") for line in lines) == (own != families.DEFAULT)
    proof = read_json(folder / "export" / "verify.json")["artifacts"]["merged_16bit"]
    assert (proof["status"], proof["failed"]) == ("ok", [])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text", "lfm2", "qwen3_moe"])
def test_a_family_that_was_cut_and_resumed_ends_as_the_whole_run(family, twin, tmp_path):
    job = (f"model.name={twin(family)}", write_rows(tmp_path))
    whole, cut = train(tmp_path / "whole", *job), tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "run.json").write_text(json.dumps({**read_json(whole / "run.json"), "status": "running"}), encoding="utf-8")
    shutil.rmtree(checkpoint.place_of(cut, 4))
    shutil.rmtree(cut / "adapter")
    train(cut, *job)
    assert read_json(cut / "run.json")["sessions"][-1]["from"] == "checkpoint-2"
    assert compare(whole, cut) == [] and adapted(cut) == adapted(whole)


def test_the_loss_of_a_mixture_is_the_same_padded_and_padding_free_unless_load_balancing_is_asked_for(twin, tmp_path):
    job = (f"model.name={twin('qwen3_moe')}", write_rows(tmp_path), "trainer.max_steps=1", "trainer.padding_free=false")
    first = read_json(train(tmp_path / "padded", *job) / "run.json")["metrics"]["eval_loss_start"]
    free = read_json(train(tmp_path / "free", *job[:-1]) / "run.json")
    assert free["plan"]["padding_free"] and free["metrics"]["eval_loss_start"] == pytest.approx(first, abs=1e-5)
    balanced = read_json(train(tmp_path / "balanced", *job[:-1], "trainer.extra.router_aux_loss_coef=0.1") / "run.json")
    assert not balanced["plan"]["padding_free"] and balanced["metrics"]["eval_loss_start"] > first + 0.05


def test_an_adapter_on_the_experts_trains_and_is_proven_merged(twin, tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    job = (
        f"model.name={twin('qwen3_moe')}",
        write_rows(tmp_path),
        f"lora.extra.target_parameters=[{','.join(names)}]",
        "lora.r=4",
    )
    whole = train(tmp_path / "whole", *job, "export=merged_16bit")
    assert "; 8 of 8 experts" in read_json(whole / "preflight.json")["coverage"]
    weights = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert any("experts" in name and "lora_B" in name and bool(tensor.any()) for name, tensor in weights.items())
    proof = read_json(whole / "export" / "verify.json")["artifacts"]
    assert {name: facts["failed"] for name, facts in proof.items()} == {"adapter": [], "merged_16bit": []}


def test_a_model_whose_rows_are_padded_is_planned_so_and_asked_for_otherwise_refused_before_its_weights(twin, tmp_path):
    job = (f"model.name={twin('gpt_oss')}", write_rows(tmp_path), "trainer.max_steps=1")
    folder = train(tmp_path / "run", *job)
    plan = read_json(folder / "preflight.json")["decided"]
    assert not plan["padding_free"] and "sinks" in plan["why_padded"]
    (twin("gpt_oss") / "model.safetensors").rename(tmp_path / "hidden")
    try:
        with pytest.raises(Refusal, match="has sinks") as refused:
            run(make_settings(*JOB, *job, "trainer.padding_free=true"), tmp_path / "asked")
    finally:
        (tmp_path / "hidden").rename(twin("gpt_oss") / "model.safetensors")
    (problem,) = refused.value.problems
    assert problem.what == "trainer.padding_free=true" and problem.fix.startswith("trainer.padding_free=null")


def test_a_model_that_caps_the_logits_of_its_attention_is_not_padding_free():
    config = CONFIG_MAPPING["gemma2"](
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        attn_logit_softcapping=50.0,
    )
    with torch.device("meta"):
        assert "caps its logits" in padding_free.obstacle(AutoModelForCausalLM.from_config(config))
    config.attn_logit_softcapping = None
    with torch.device("meta"):
        assert padding_free.obstacle(AutoModelForCausalLM.from_config(config)) == ""


@pytest.mark.skipif(bool(gguf.missing_parts()), reason=f"llama.cpp's parts are not installed: {gguf.INSTALL}")
@pytest.mark.parametrize(
    ("family", "why"), [("ministral3", "asks its own package gguf"), ("gemma4", "looks for global_head_dim")]
)
def test_gguf_files_that_upstream_cannot_make_are_refused_before_training(family, why, twin, tmp_path):
    job = (f"model.name={twin(family)}", write_rows(tmp_path), "export.formats=[merged_16bit,gguf]")
    with pytest.raises(Refusal, match=why) as refused:
        run(make_settings(*JOB, *job), tmp_path / "run")
    (problem,) = refused.value.problems
    assert problem.fix == "export.formats=[merged_16bit]" and not (tmp_path / "run" / "run.json").exists()
    assert run(make_settings(*JOB, *job, problem.fix, "trainer.max_steps=1"), tmp_path / "run").exit_code == 0
    with pytest.raises(ExportError):  # so the table does not outlive the fault
        gguf.convert(twin(family), tmp_path / "model.gguf")


def test_an_architecture_that_the_converter_does_not_name_is_refused():
    if not gguf.missing_parts():
        (problem,) = gguf.check_architecture({"model_type": "new", "architectures": ["NewForCausalLM"]}, ["gguf"])
        assert "does not know NewForCausalLM" in problem.why
    assert gguf.check_architecture({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["gguf"]) == []
    assert gguf.check_architecture({}, ["gguf"]) == []


def test_the_tables_of_families_are_up_to_date_and_name_each_preset_once():
    assert families_table.main(["--check"]) == 0
    assert TWINS.keys() == {*families_table.FAMILIES, *TEXTS.values()}
    presets = [preset for shown in families_table.FAMILIES.values() for preset in shown.presets]
    assert sorted([*presets, "tiny_random"]) == sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml"))
    refused = {family for family, shown in families_table.FAMILIES.items() if shown.gguf == families_table.REFUSED}
    assert refused == {*families_table.FAMILIES} & {*gguf.UNREAD}
