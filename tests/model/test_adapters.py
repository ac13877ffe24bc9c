"""The modules that `lora` names are held against the model before its weights are loaded."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig

from sft.cli.check import check_command_line
from sft.config.schema import LoraSettings
from sft.errors import Refusal
from sft.export import merge
from sft.lifecycle import run
from sft.methods import sft
from sft.model import adapters, dims, hub, loading, targets
from sft.plan.plan import Plan
from sft.preflight.checks import examine
from sft.storage.jsonio import read_json
from tests.conftest import ROOT, make_settings


@pytest.fixture(scope="module")
def tiny():
    """tiny_random without its weights."""
    settings = make_settings("model=tiny_random")
    return dims.empty_model(settings, hub.locate(settings.model, weights=False)[0])[0]


ATTENTION = "q_proj,k_proj,v_proj,o_proj"
LINEAR = f"{ATTENTION},gate_proj,up_proj,down_proj"


@pytest.mark.parametrize(
    ("override", "why", "fix"),
    [
        ("modules_to_save=[lm_haed]", "no module named lm_haed, so that it would train nothing. Did you mean lm_head?",
         "lora.modules_to_save=[lm_head]"),
        ("modules_to_save=[embed_tokens,xyz]", "Its modules are: model, embed_tokens, ", "lora.modules_to_save=[embed_tokens]"),
        ("modules_to_save=[act_fn]", "act_fn has no weights to train", "lora.modules_to_save=[]"),
        ("modules_to_save=[layers]", "layers is a list of modules", "lora.modules_to_save=[]"),
        ("target_modules=[mlp]", "mlp is a block of gate_proj, up_proj, down_proj",
         "'lora.target_modules=[gate_proj,up_proj,down_proj]'"),
        ("target_modules=[q_proj,self_attn,mlp]", f"self_attn is a block of {ATTENTION.replace(',', ', ')}; mlp is a block",
         f"'lora.target_modules=[{LINEAR}]'"),
        ("target_modules=[input_layernorm]", "input_layernorm is no linear layer. The linear layers are: q_proj, ",
         "lora.target_modules=[all-linear]"),
        ("target_modules=[all-linear,lm_head]", "all-linear stands alone", f"'lora.target_modules=[{LINEAR},lm_head]'"),
        ("target_modules=[q_porj,v_proj]", "Did you mean q_proj?", "'lora.target_modules=[q_proj,v_proj]'"),
        ("target_modules=[nothing]", "Its linear layers are: q_proj, ", "lora.target_modules=[all-linear]"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_trained_is_refused_with_a_fix_that_is_taken(tiny, override, why, fix):
    problems, _ = adapters.check_modules(tiny, make_settings(f"lora.{override}").lora)
    assert [p.what for p in problems] == [f"lora.{override}"] and why in problems[0].why
    assert problems[0].fix == fix
    assert adapters.check_modules(tiny, make_settings(fix.strip("'")).lora) == ([], [])


@pytest.mark.parametrize(
    "override",
    ["target_modules=[all-linear]", "target_modules=[embed_tokens]", "target_modules=[q_proj,lm_head]",
     "modules_to_save=[norm]", "target_modules=[layers.0.mlp.up_proj]", "modules_to_save=[lm_head]",
     "modules_to_save=[model.layers.1.input_layernorm]"],
)  # fmt: skip
def test_what_peft_takes_is_allowed(tiny, override):
    assert adapters.check_modules(tiny, make_settings(f"lora.{override}").lora) == ([], [])


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (".*self_attn.*", ["q_proj", "k_proj", "v_proj", "o_proj"]),  # PEFT ends at the block itself
        (".*layers.1.*(q|up)_proj", ["q_proj", "up_proj"]),
        ("model.*", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]),
    ],
)
def test_a_regular_expression_means_the_layers_whose_whole_names_it_matches(tiny, target, names):
    lora = make_settings(f'lora.target_modules=["{target}"]').lora
    assert adapters.check_modules(tiny, lora) == ([], [])
    assert {name.rpartition(".")[2] for name in targets.reached(tiny, lora)} == {*names}
    mixed = make_settings(f'lora.target_modules=["{target}",lm_head]').lora
    assert {*targets.reached(tiny, mixed)} - {*targets.reached(tiny, lora)} == {"lm_head"}


@pytest.mark.parametrize(
    ("target", "fix"),
    [("(q|v)_proj", "'lora.target_modules=[\".*((q|v)_proj)\"]'"), ("visual.*", "lora.target_modules=[all-linear]"),
     (".*self_attn", "lora.target_modules=[all-linear]")],
)  # fmt: skip
def test_a_regular_expression_that_matches_no_layer_is_refused(tiny, target, fix):
    problems, _ = adapters.check_modules(tiny, make_settings(f'lora.target_modules=["{target}"]').lora)
    assert len(problems) == 1 and "matches none" in problems[0].why and problems[0].fix == fix
    assert adapters.check_modules(tiny, make_settings(fix.strip("'")).lora) == ([], [])


def test_an_adapter_by_a_regular_expression_loads_in_plain_peft(small, tmp_path):
    target = 'lora.target_modules=[".*self_attn.*"]'
    assert run(small("trainer=debug", "trainer.max_steps=2", target), tmp_path / "run").exit_code == 0
    base = loading.load_model(small(), Plan())[0]
    with_one = {
        n for n, m in PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).named_modules() if hasattr(m, "lora_A")
    }
    assert {name.rpartition(".")[2] for name in with_one} == {"q_proj", "k_proj", "v_proj", "o_proj"} and len(with_one) == 8
    assert "4 of 8 kinds of linear layers, 8 of 15 layers" in read_json(tmp_path / "run/preflight.json")["coverage"]


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        ("lora.target_modules=.*self_attn.*", "'lora.target_modules=[\".*self_attn.*\"]'"),
        ("lora.target_modules=q_proj", "lora.target_modules=[q_proj]"),
        ("lora.layers_to_transform=[0]", "lora.extra.layers_to_transform=[0]"),
        ("lora.rank_pattern={q_proj:4}", "'lora.extra.rank_pattern={q_proj:4}'"),
        ("lora.init_lora_weights=pissa", "lora.extra.init_lora_weights=pissa"),
        ("lora.extra.rank_pattern={q_proj:four,v_proj:2}", "'lora.extra.rank_pattern={v_proj:2}'"),
        ('lora.target_modules=[".*(q"]', "lora.target_modules=[all-linear]"),
    ],
)
def test_what_is_typed_as_peft_spells_it_is_taken_or_gets_a_fix_that_is_taken(typed, fix):
    with pytest.raises(Refusal) as refused:
        check_command_line(ROOT / "conf", ["model=tiny_random", typed])
    assert [p.fix.partition("   ")[0] for p in refused.value.problems] == [fix]
    check_command_line(ROOT / "conf", ["model=tiny_random", fix.strip("'")])


def test_gpt2s_layers_which_are_no_torch_linear_are_targets():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    assert adapters.check_modules(model, LoraSettings(target_modules=["c_attn"])) == ([], [])
    fix = adapters.check_modules(model, LoraSettings(target_modules=["attn"]))[0][0].fix
    assert fix == "'lora.target_modules=[c_attn,c_proj]'"


def test_a_trained_head_of_tied_embeddings_is_merged_and_stays_tied():
    settings = make_settings("model=tiny_random", "lora.modules_to_save=[lm_head]")
    model = adapters.attach(loading.load_model(settings, Plan())[0], settings, Plan()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += 0.1 * torch.randn_like(weight) if "modules_to_save" in name else 0
    rows = torch.arange(1, 9)[None]
    trained = model(rows).logits
    merged = merge.merge(model).float()
    assert merged.config.tie_word_embeddings and merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.allclose(merged(rows).logits, trained, atol=0.05) and trained.abs().max() > 1


def test_targets_inside_of_what_is_trained_whole_are_told_or_refused(tiny):
    """PEFT leaves them without an adapter, and raises where that leaves none."""
    problems, warnings = adapters.check_modules(tiny, make_settings("lora.modules_to_save=[mlp]").lora)
    assert not problems and warnings[0].startswith("gate_proj, up_proj, down_proj of lora.target_modules get no adapter")
    # embed_tokens and lm_head share their weight
    targets = LoraSettings(target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    assert "No layer is left" in adapters.check_modules(tiny, targets)[0][0].why


def test_all_problems_of_modules_come_at_once_and_before_loading(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    settings = small("lora.target_modules=[mlp]", "lora.modules_to_save=[lm_haed]", "dataset.columns.output=nothing")
    found = examine(settings, tmp_path, Plan(), {})
    assert {"lora.target_modules=[mlp]", "lora.modules_to_save=[lm_haed]"} < {p.what for p in found.problems}
    with pytest.raises(Refusal, match="Did you mean lm_head"):
        run(settings, tmp_path / "run")


def test_a_model_that_cannot_be_looked_at_beforehand_is_asked_once_it_is_loaded(small):
    settings = small("lora.modules_to_save=[lm_haed]")
    with pytest.raises(Refusal, match="Did you mean lm_head"):
        adapters.attach(loading.load_model(settings, Plan())[0], settings, Plan())


@pytest.mark.parametrize(
    "overrides", [("lora.target_modules=[q_proj,lm_head]",), ("trainer.extra.label_smoothing_factor=0.1",)], ids=str
)
def test_padded_rows_train_where_the_chunked_loss_does_not_fit(small, tmp_path, overrides):
    padded = "trainer.padding_free=false"
    result = run(small("trainer=debug", "trainer.max_steps=2", padded, *overrides), tmp_path / "run")
    assert (result.status, result.exit_code) == ("finished", 0)


def test_the_chunked_loss_is_kept_where_it_fits_and_left_where_logits_are_scaled(tiny):
    config = GraniteConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=16,
                           num_key_value_heads=2, logits_scaling=8.0)  # fmt: skip
    with torch.device("meta"):
        scaled = AutoModelForCausalLM.from_config(config)
    settings = SimpleNamespace(trainer=SimpleNamespace(extra={}))
    assert sft._takes_chunks(tiny, settings) and not sft._takes_chunks(scaled, settings)
