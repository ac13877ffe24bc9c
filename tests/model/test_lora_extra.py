"""PEFT's other options: checked by name and type, and each of them acts."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3NextConfig

from sft.config.fingerprint import config_hash
from sft.config.lora_rules import check_lora
from sft.config.rules import check_settings
from sft.config.schema import LoraSettings
from sft.config.upstream import lora_config_options
from sft.export import lora_gguf, measure, merge
from sft.lifecycle import run
from sft.methods import sft
from sft.model import adapters, dims, hub, loading, targets
from sft.plan.plan import Plan
from sft.storage.jsonio import read_json, read_lines
from tests.conftest import SMALL, make_settings

pytestmark = pytest.mark.usefixtures("forked_children")
QUICK = ("trainer=debug", "trainer.max_steps=4", "trainer.warmup_steps=0", "trainer.learning_rate=0.01")


@pytest.fixture(scope="module")
def tiny():
    settings = make_settings("model=tiny_random")
    return dims.empty_model(settings, hub.locate(settings.model, weights=False)[0])[0]


def attached(*overrides):
    """tiny_random with the adapter of these overrides."""
    settings = make_settings("model=tiny_random", *overrides)
    return adapters.attach(loading.load_model(settings, Plan())[0], settings, Plan())


def train(folder, *overrides):
    result = run(make_settings(*SMALL, *QUICK, *overrides), folder)
    assert (result.status, result.exit_code) == ("finished", 0), read_json(folder / "run.json").get("reason")
    return folder


# ---------------------------------------------------------------------------------------------- names, types, reasons


@pytest.mark.parametrize(
    ("override", "why", "fix"),
    [
        ("lora.extra.rank_patern={q_proj:4}", "Did you mean rank_pattern?", "'lora.extra.rank_pattern={q_proj:4}'"),
        ("lora.extra.nothing_like_it=1", "It has: alpha_pattern, ", "leave lora.extra.nothing_like_it out"),
        ("lora.extra.r=4", "It has a setting of its own.", "lora.r=4"),
        ("lora.extra.target_modules=[q_proj]", "It has a setting of its own.", "lora.target_modules=[q_proj]"),
        ("lora.extra.task_type=CAUSAL_LM", "A run fills this in by itself.", "leave lora.extra.task_type out"),
        ("lora.extra.revision=abc", "Another setting decides this.", "model.revision=abc"),
        ("lora.extra.layers_to_transform=first", "PEFT takes Union[list[int], int] or null.",
         "leave lora.extra.layers_to_transform out"),
        ("lora.extra.rank_pattern=4", "PEFT takes dict or null.", "leave lora.extra.rank_pattern out"),
        ("lora.extra.init_lora_weights=pisa", "It can be: true, false, gaussian, ", "lora.extra.init_lora_weights=pissa"),
        ("lora.extra.init_lora_weights=eva", "what the training rows do", "lora.extra.init_lora_weights=pissa"),
        ("lora.extra.init_lora_weights=loftq", "LoftQ rounds the model's own weights",
         "leave lora.extra.init_lora_weights out"),
        ("lora.extra.layer_replication=[[0,1]]", "repeats layers", "leave lora.extra.layer_replication out"),
        ("lora.extra.megatron_core=os", "a module that PEFT would import", "leave lora.extra.megatron_core out"),
        ("lora.extra.loraplus_lr_ratio=much", "It has to be a number above 0.", "lora.extra.loraplus_lr_ratio=16"),
        ("lora.extra.layers_pattern=layers", "Alone it would be ignored.", None),
    ],
)  # fmt: skip
def test_an_option_that_peft_does_not_take_is_refused_with_what_it_takes(override, why, fix):
    problems = check_settings(make_settings(override), hardware=False)
    assert len(problems) == 1 and why in problems[0].why, problems
    assert fix is None or problems[0].fix == fix
    if fix and not fix.startswith("leave"):
        assert check_lora(make_settings(fix.strip("'"))) == []


def test_every_option_of_lora_config_is_known_by_its_source():
    assert set(lora_config_options()) == {f for f in LoraConfig.__dataclass_fields__ if not f.startswith("_")}


def test_an_option_that_is_taken_is_part_of_the_config_hash_only_where_it_is_set():
    plain = config_hash(make_settings("model=tiny_random"))
    assert config_hash(make_settings("model=tiny_random", "lora.extra.layers_to_transform=[0]")) != plain


def test_pissa_on_quantised_weights_is_refused():
    settings = make_settings("lora.extra.init_lora_weights=pissa", "model.load_in_4bit=true")
    assert [p.fix for p in check_lora(settings)] == ["model.load_in_4bit=false"]


@pytest.mark.parametrize(
    ("overrides", "why", "fix"),
    [
        (["lora.extra.rank_pattern={q_porj:4}"], "No layer with an adapter is named q_porj.",
         "'lora.extra.rank_pattern={q_proj:4}'"),
        (["lora.extra.layers_to_transform=[1,7]"], "The model's layers are 0 to 1.", "lora.extra.layers_to_transform=[1]"),
        (["lora.extra.exclude_modules=[lm_head]"], "it would exclude nothing", "leave lora.extra.exclude_modules out"),
        (["lora.extra.trainable_token_indices=[5,99999999]"], "none for 99999999", "lora.extra.trainable_token_indices=[5]"),
        (["lora.extra.target_parameters=[experts.down_proj]"], "no parameter named experts.down_proj",
         "leave lora.extra.target_parameters out"),
        (["lora.extra.exclude_modules=.*"], "", None),
    ],
)  # fmt: skip
def test_an_option_that_names_nothing_in_the_model_is_refused_before_loading(tiny, overrides, why, fix):
    lora = make_settings(*overrides).lora
    problems = adapters.check_modules(tiny, lora)[0] or adapters.coverage(tiny, lora)[1]
    assert len(problems) == 1 and why in problems[0].why, problems
    if fix is None:
        assert problems[0].why == "No layer of the model gets an adapter."
    else:
        assert problems[0].fix.strip("'") == fix.strip("'")


def test_what_peft_itself_refuses_is_known_without_weights(tiny):
    extra = {"trainable_token_indices": [5]}
    problems, _ = adapters.check_modules(tiny, LoraSettings(target_modules=["embed_tokens"], extra=extra))
    assert problems[0].what == "lora.extra.trainable_token_indices=[5]"
    assert problems[0].why.startswith("PEFT does not take it: trainable_token_indices cannot be applied")


# ------------------------------------------------------------------------------------------------------- each acts


def layers_of(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


def test_rank_pattern_and_alpha_pattern_set_rank_and_scale_of_some_layers():
    found = layers_of(attached("lora.extra={rank_pattern:{q_proj:4},alpha_pattern:{v_proj:64}}"))
    ranks = {n.rpartition(".")[2]: m.r["default"] for n, m in found.items()}
    scales = {n.rpartition(".")[2]: m.scaling["default"] for n, m in found.items()}
    assert (ranks["q_proj"], ranks["k_proj"]) == (4, 16) and (scales["v_proj"], scales["k_proj"], scales["q_proj"]) == (4, 1, 4)


@pytest.mark.parametrize("target", ["[all-linear]", "[q_proj]"])
def test_layers_to_transform_leaves_the_other_layers_out(target):
    found = layers_of(attached(f"lora.target_modules={target}", "lora.extra.layers_to_transform=[1]"))
    assert found and all(".layers.1." in name for name in found) and not any("lm_head" in name for name in found)


def test_exclude_modules_excludes(tiny):
    lora = make_settings("lora.extra.exclude_modules=[o_proj]").lora
    assert not any("o_proj" in n for n in targets.reached(tiny, lora))
    assert set(targets.reached(tiny, lora)) == {n.removeprefix("base_model.model.") for n in layers_of(
        attached("lora.extra.exclude_modules=[o_proj]"))}  # fmt: skip


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "false"])
def test_another_start_gives_other_first_weights(start):
    usual, other = (layers_of(attached(*o)) for o in ((), (f"lora.extra.init_lora_weights={start}",)))
    name = next(iter(usual))
    assert not torch.equal(usual[name].lora_A["default"].weight, other[name].lora_A["default"].weight)


def test_lora_plus_gives_b_a_rate_of_its_own_that_the_schedule_lowers_too(tmp_path, monkeypatch):
    rates = []
    original = sft._raise_rate_of_b
    monkeypatch.setattr(sft, "_raise_rate_of_b", lambda *args: (original(*args), rates.append(args)))
    folder = train(tmp_path / "run", "lora.extra.loraplus_lr_ratio=16", "trainer.lr_scheduler_type=constant")
    optimizer, model, ratio = rates[0]
    of_b = {id(p) for n, p in model.named_parameters() if ".lora_B." in n}
    groups = [(part["lr"], {id(p) in of_b for p in part["params"]}) for part in optimizer.param_groups if part["params"]]
    assert ratio == 16 and groups == [(0.01, {False}), (0.16, {True})]
    logged = {line["learning_rate"] for line in read_lines(folder / "metrics.jsonl") if "learning_rate" in line}
    assert logged == {0.01}, "the rate of A"


def test_trained_tokens_alone_change_in_the_embeddings_and_the_merged_model_has_them(tmp_path):
    folder = train(tmp_path / "run", "lora.extra.trainable_token_indices=[1,2]", "export=merged_16bit", "model.dtype=float32")
    settings = make_settings(*SMALL)
    base = loading.load_model(settings, Plan())[0].get_input_embeddings().weight.float()
    merged = load_file(folder / "export/merged_16bit/model.safetensors")["model.embed_tokens.weight"].float()
    changed = ((base - merged).norm(dim=1) / base.norm(dim=1) > 0.01).nonzero().flatten().tolist()
    assert changed and set(changed) <= {1, 2}


@pytest.mark.parametrize("rslora", ["true", "false"])
def test_a_gguf_adapter_has_each_layers_scale_in_its_matrix(rslora):
    """llama.cpp multiplies by the one alpha of the file over a layer's rank."""
    model = attached("lora.extra={rank_pattern:{q_proj:4},alpha_pattern:{v_proj:64}}", f"lora.use_rslora={rslora}")
    config = model.peft_config["default"].to_dict()
    alpha = config["lora_alpha"] * (config["r"] ** 0.5 if config["use_rslora"] else 1)
    for name, layer in layers_of(model).items():
        path = name.removeprefix("base_model.model.")
        scale = alpha / layer.r["default"] * lora_gguf._scale_beside(config, path, alpha)
        assert scale == pytest.approx(layer.scaling["default"]), path


# ----------------------------------------------------------------- starts that are taken out of the model's own weights


@pytest.mark.parametrize("overrides", [("lora.extra.init_lora_weights=pissa",),
                                       ("lora.extra.init_lora_weights=pissa_niter_4", "lora.use_rslora=true",
                                        "lora.extra.rank_pattern={q_proj:4}", "lora.extra.alpha_pattern={v_proj:32}"),
                                       ("lora.extra.init_lora_weights=olora",)], ids=str)  # fmt: skip
def test_an_adapter_that_began_with_the_models_weights_loads_in_plain_peft_on_the_model_as_it_is(tmp_path, overrides):
    folder = train(tmp_path / "run", *overrides, "export=merged_16bit", "export.num_prompts=2")
    config = json.loads((folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 32 and config["init_lora_weights"] is True
    checks = read_json(folder / "export/verify.json")["artifacts"]
    assert {name: found["status"] for name, found in checks.items()} == {"adapter": "ok", "merged_16bit": "ok"}
    metrics, lines = read_json(folder / "run.json")["metrics"], read_lines(folder / "metrics.jsonl")
    base = loading.load_model(make_settings(*SMALL), Plan())[0]
    plain = PeftModel.from_pretrained(base, str(folder / "adapter"))
    rows = measure.read_rows(folder)
    assert measure.row_losses(plain, rows)[0] == pytest.approx(metrics["proof_loss"], abs=1e-4)
    with plain.disable_adapter():
        untrained = measure.row_losses(plain, rows)[0]
    assert untrained == pytest.approx(lines[0]["eval_loss"], abs=1e-3), "the first loss is the model's own"
    assert metrics["proof_loss"] < untrained - 0.01


def test_a_pissa_run_that_was_cut_ends_as_the_whole_one(tmp_path, cut_at_first_save):
    overrides = ("lora.extra.init_lora_weights=pissa", "trainer.save_steps=2")
    whole = train(tmp_path / "whole", *overrides)
    from sft.training.checkpoint import place_of

    assert cut_at_first_save(make_settings(*SMALL, *QUICK, *overrides), tmp_path / "cut").status == "failed"
    assert place_of(tmp_path / "cut", 2).is_dir()
    cut = train(tmp_path / "cut", *overrides)
    one, other = (load_file(f / "adapter/adapter_model.safetensors") for f in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    settings = make_settings(*SMALL, *overrides)
    checkpoint = merge.load_trained(settings, place_of(cut, 4))
    kept = merge.load_trained(settings, cut / "adapter")
    rows = measure.read_rows(cut)
    assert measure.row_losses(checkpoint, rows)[0] == pytest.approx(measure.row_losses(kept, rows)[0], abs=1e-4)


# ---------------------------------------------------------------------------------------- experts and token mixers


SIZES = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
             num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, vocab_size=64)  # fmt: skip


def empty(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_experts_are_counted_and_target_parameters_give_them_an_adapter():
    model = empty(Qwen3MoeConfig(**SIZES))
    text, problems, warnings = adapters.coverage(model, LoraSettings(target_modules=["q_proj"]))
    assert text.endswith("; 0 of 16 experts") and not problems
    fix = "lora.extra.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
    assert warnings == [f"None of the 16 experts gets an adapter. {fix} gives them one."]
    lora = make_settings(fix, "lora.target_modules=[q_proj]").lora
    assert adapters.check_modules(model, lora) == ([], [])
    text, _, warnings = adapters.coverage(model, lora)
    assert text.endswith("; and on gate_up_proj, down_proj; 16 of 16 experts") and not warnings


def test_an_adapter_on_experts_is_merged():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES))
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False,
                      target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = get_peft_model(model, lora)
    wrapper = adapted.base_model.model.model.layers[1].mlp.experts
    added = {m.parameter_name: m.get_delta_weight("default").detach() for m in (wrapper, wrapper.base_layer)}
    after = dict(merge.merge(adapted).named_parameters())
    assert after.keys() == before.keys() and added.keys() == {"gate_up_proj", "down_proj"}
    for name, delta in added.items():
        whole = f"model.layers.1.mlp.experts.{name}"
        assert delta.abs().max() > 0.01 and torch.equal(after[whole].data, (before[whole] + delta).to(torch.bfloat16))


def test_a_kind_of_token_mixer_that_is_left_out_is_told_by_name():
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    model = empty(Qwen3NextConfig(**SIZES, layer_types=kinds, shared_expert_intermediate_size=16))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    text, problems, warnings = adapters.coverage(model, LoraSettings(target_modules=names))
    assert "; 1 of 4 token mixers; 0 of 16 experts" in text and not problems
    assert warnings[0].startswith("No linear_attn gets an adapter, 3 of the 4 token mixers. Its linear layers are in_proj_qkvz")
    fix = warnings[0].rpartition(": ")[2].strip("'")
    assert "; 4 of 4 token mixers" in adapters.coverage(model, make_settings(fix).lora)[0]


def test_the_coverage_of_plain_models(tiny):
    assert adapters.coverage(tiny, LoraSettings()) == (
        "an adapter on 7 of 8 kinds of linear layers, 14 of 15 layers; not: lm_head", [], [])  # fmt: skip
    text, _, warnings = adapters.coverage(tiny, make_settings("lora=attention_only").lora)
    assert "4 of 8 kinds" in text and "not: gate_proj, up_proj, down_proj, lm_head" in text and not warnings
    _, _, warnings = adapters.coverage(tiny, LoraSettings(target_modules=["up_proj"]))
    assert warnings[0].startswith("No self_attn gets an adapter, 2 of the 2 token mixers.")
    _, _, warnings = adapters.coverage(tiny, LoraSettings(target_modules=[".*mlp.*"]))
    fix = warnings[0].rpartition(": ")[2].strip("'")
    assert "; not: lm_head" in adapters.coverage(tiny, make_settings(fix).lora)[0]
