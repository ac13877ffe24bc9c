"""Layers that get an adapter by default, by a model's family."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sft.config.provenance import DEFAULT
from sft.config.schema import Backend
from sft.model import adapters, targets
from sft.plan import families
from sft.plan.plan import Plan, plan_targets, with_model_plan
from tests.conftest import make_settings

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
             num_key_value_heads=2, head_dim=16, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
             num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)  # fmt: skip

SOURCES = {"lora.target_modules": DEFAULT}


def planned(model_type, *overrides, sources=SOURCES, before=None):
    """The settings and the plan of a model of this type."""
    settings = make_settings(*overrides)
    plan = plan_targets(Plan(), settings, lambda: {"model_type": model_type}, sources, before)
    return with_model_plan(settings, plan), plan


@pytest.mark.parametrize("family", families.OWN)
def test_a_familys_own_layers_are_in_its_models_and_leave_no_token_mixer_out(family):
    both = family in ("gemma3", "gemma4")
    parts = {"text_config": SIZES, "vision_config": {}, "audio_config": {}} if both else SIZES
    kinds = {"layer_types": ["conv", "full_attention"] * 2} if family == "lfm2" else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**parts, **kinds))
    lora = planned(family)[0].lora
    assert lora.target_modules == families.OWN[family]
    assert adapters.check_modules(model, lora) == ([], [])
    text, problems, warnings = adapters.coverage(model, lora)
    assert not problems and not [w for w in warnings if not w.startswith("None of the")], text
    if both:
        names = [*targets.reached(model, lora)]
        assert len(names) == 7 * 4 and all("language_model" in name for name in names)
        return
    assert bool(warnings) == (family in families.MIXTURES), "the experts are said to be left out"
    rest = text.partition("; not: ")[2].partition(";")[0].split(", ")
    assert {*rest} <= {"lm_head", "in_proj_a", "in_proj_b", "in_proj_ba", "shared_expert_gate"}


def test_targets_that_were_chosen_are_never_changed():
    default = make_settings().lora.target_modules
    for origin in ("command line", "lora/mine.yaml"):
        settings, plan = planned("lfm2", sources={"lora.target_modules": origin})
        assert (settings.lora.target_modules, plan.target_modules) == (default, None)
    settings, plan = planned("lfm2", "lora.target_modules=[q_proj]", sources={})
    assert (settings.lora.target_modules, plan.target_modules) == (["q_proj"], None)
    assert planned("lfm2", "lora=none")[1].target_modules is None
    settings, plan = planned("llama")
    assert (settings.lora, plan) == (make_settings().lora, Plan())


def test_the_plan_gives_the_reason_and_says_that_experts_are_left_out():
    assert planned("lfm2")[1].reasons["targets"] == "lfm2's own layers"
    assert planned("qwen3_5_text")[1].reasons["targets"] == "qwen3_5_text's own layers"
    assert planned("gpt_oss")[1].reasons["targets"].endswith("the experts, which are parameters and no layers, are left out")


def test_a_resumed_run_keeps_the_layers_that_it_began_with():
    began = planned("lfm2")[1].facts()
    settings, plan = planned("lfm2", sources={"lora.target_modules": "run.json"}, before=began)
    assert settings.lora.target_modules == families.OWN["lfm2"] and plan.reasons["targets"] == "as the run began"
    older = {name: value for name, value in began.items() if name != "target_modules"}
    settings, plan = planned("qwen3_5_text", before=older)
    assert settings.lora == make_settings().lora and plan == Plan()
    assert settings.model.backend == Backend.transformers
