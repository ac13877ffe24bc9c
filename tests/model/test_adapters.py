"""The modules that `lora` names are held against the model before its weights are loaded."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig

from sft.config.schema import LoraSettings
from sft.errors import Refusal
from sft.methods import sft
from sft.model import adapters, dims, hub, loading
from sft.plan.plan import Plan
from sft.preflight.checks import examine
from sft.run import run
from tests.conftest import make_settings


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


def test_gpt2s_layers_which_are_no_torch_linear_are_targets():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    assert adapters.check_modules(model, LoraSettings(target_modules=["c_attn"])) == ([], [])
    fix = adapters.check_modules(model, LoraSettings(target_modules=["attn"]))[0][0].fix
    assert fix == "'lora.target_modules=[c_attn,c_proj]'"


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
