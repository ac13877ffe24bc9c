"""The estimate of peak memory, held against what was measured; and the split of a step that follows from it."""

import json
from dataclasses import replace

import pytest

from benchmarks import grid
from benchmarks.families import SHAPES
from sft.config.batching import BatchPlan, batch_plan_of, candidates, check_batch_plan, with_batch_plan
from sft.config.hardware import CAPACITY, CONTEXT
from sft.config.schema import Gpu, LoraSettings, Settings, TrainerSettings
from sft.model.dims import dims_of
from sft.plan import families
from sft.plan.machine import Machine
from sft.plan.memory import (
    LoadPlan,
    ModelDims,
    _score_bytes,
    cost,
    estimate,
    fitting_batch_plan,
    kept_by_layer,
    largest,
    loss_bytes,
    tokens_at_once,
)
from sft.plan.plan import load_plan_of, plan_model, plan_training
from tests.conftest import ROOT, make_settings
from tests.hints import type_hints

# Llama 3 8B with LoRA r 16 on its seven projections.
LLAMA_8B = ModelDims(8030261248, 6979321856, 41943040, 1245184, 58720256, 4096, 14336, 32, 32, 4096, 1024, 128256)
# And Llama 3.2 1B.
LLAMA_1B = ModelDims(1235814400, 973078528, 11272192, 327680, 16777216, 2048, 8192, 16, 32, 2048, 512, 128256)


@pytest.fixture(scope="module")
def llama():
    """Llama 3 8B on the meta device, and its config."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


def test_the_shape_of_llama_3_8b_is_counted_from_its_config(llama):
    assert dims_of(*llama, Settings()) == replace(LLAMA_8B, widest_head=128)


def test_adapters_and_whole_modules_are_counted(llama):
    def trained(**options):
        return dims_of(*llama, Settings(lora=LoraSettings(**options))).trained

    assert trained(target_modules=["all-linear"]) == trained() == 41943040
    assert trained(r=8, target_modules=["q_proj", "v_proj"]) == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert trained(modules_to_save=["lm_head"]) == 41943040 + 128256 * 4096
    assert trained(enabled=False) == 8030261248


@pytest.fixture(scope="module")
def qwen3_30b_a3b():
    """Qwen3 30B A3B on the meta device, and its config."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, head_dim=128,
                            num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
                            moe_intermediate_size=768)  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


ATTENTION_ALONE = LoraSettings(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def test_a_mixture_is_counted_from_its_config(qwen3_30b_a3b):
    attention, experts = 2 * 2048 * 4096 + 2 * 2048 * 512, 128 * 3 * 2048 * 768
    layer = attention + experts + 128 * 2048 + 2 * 128 + 2 * 2048  # the router, the norms of heads, those of the layer
    adapter = 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert dims_of(*qwen3_30b_a3b, Settings(lora=ATTENTION_ALONE)) == ModelDims(
        parameters=48 * layer + 2 * 151936 * 2048 + 2048,
        packed=48 * attention,
        trained=48 * adapter,
        adapted_inputs=48 * (3 * 2048 + 4096),
        largest=2048 * 4096,
        hidden_size=2048,
        intermediate_size=8 * 768,
        num_hidden_layers=48,
        num_attention_heads=32,
        query_size=4096,
        key_value_size=512,
        vocab_size=151936,
        routed=8 * 2048,
        norms=4096 + 512,
        widest_head=128,
    )
    assert 48 * layer + 2 * 151936 * 2048 + 2048 == 30_532_122_624


def test_a_mixture_holds_all_experts_and_keeps_what_those_make_that_a_token_is_sent_to(qwen3_30b_a3b):
    shape = dims_of(*qwen3_30b_a3b, Settings(lora=ATTENTION_ALONE))
    guess = estimate(shape, LoadPlan("transformers", adapter_bytes=4, checkpointing=False, padding_free=True), 1, 2048)
    assert guess.weights == pytest.approx(2 * 30_532_122_624 / 2**30)
    assert guess.trained == pytest.approx(13_369_344 * (4 + 4 + 8) / 2**30)
    layer = 4 * (2 * 2048 + 4096 + 512) + 2 * (2 * 4096 + 2 * 512 + 3 * 6144 + 10240) + 2 * 8 * 2048
    # The layers and the two ends; then the gradients inside a layer, and of the loss a piece of logits, of which the larger.
    passing, loss = 2048 * 2 * (4 * 6144 + 2 * 2048 + 2 * 8 * 2048), 8 * 2**27
    assert guess.activations == pytest.approx((2048 * (48 * layer + 4 * 2 * 2048) + max(passing, loss)) / 2**30)
    four = estimate(shape, LoadPlan("transformers", bits=4, padding_free=True), 1, 2048)
    experts = 48 * 128 * 3 * 2048 * 768
    assert four.weights > 2 * experts / 2**30, "experts are not packed"


def test_adapters_on_experts_are_not_estimated(qwen3_30b_a3b):
    lora = replace(ATTENTION_ALONE, extra={"target_parameters": ["mlp.experts.down_proj"]})
    assert dims_of(*qwen3_30b_a3b, Settings(lora=lora)) is None


SMALL = dict(vocab_size=64, hidden_size=256, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=96,
             pad_token_id=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
SPARSE = dict(num_experts_per_tok=3, moe_intermediate_size=112)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=40, linear_value_head_dim=24)


@pytest.mark.parametrize(
    ("family", "kind", "sizes"),
    [("llama", None, {}), ("qwen3", None, {}), ("phi3", None, {}),
     ("mixtral", None, {"num_local_experts": 8, "num_experts_per_tok": 3}), ("qwen3_moe", None, {**SPARSE, "num_experts": 8}),
     ("gpt_oss", None, {"num_experts_per_tok": 3, "num_local_experts": 8, "sliding_window": 64}),
     ("gemma3_text", "sliding_attention", {"sliding_window": 64}), ("lfm2", "conv", {}),
     ("gemma4_text", "sliding_attention", {"sliding_window": 64, "global_head_dim": 96, "vocab_size_per_layer_input": 64,
                                           "hidden_size_per_layer_input": 16}),
     ("qwen3_5_text", "full_attention", {}), ("qwen3_5_text", "linear_attention", DELTA)],
)  # fmt: skip
def test_what_a_familys_layer_keeps_is_what_autograd_holds_for_it(family, kind, sizes):
    """Bytes a token of the tensors that one more layer saves for its backward pass, on the CPU in bfloat16, a row of 256."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = [name for name in families.OWN.get(family, families.DEFAULT) if "." not in name] or families.DEFAULT

    def saved(layers):
        kinds = {"layer_types": [kind] * layers} if kind else {}
        config = CONFIG_MAPPING[family](**{**SMALL, **sizes, **kinds, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shape = dims_of(model, config, Settings(lora=LoraSettings(target_modules=names, r=2)))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=names))
        own, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = tensor, storage.nbytes()  # with the tensor, so that its place is not given away
            return tensor

        ids = torch.randint(0, 64, (1, 256), generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            model.get_base_model().model(input_ids=ids, use_cache=False)
        return sum(size for _, size in held.values()) / 256, shape

    (one, _), (two, shape) = saved(1), saved(2)
    load = LoadPlan("transformers", padded=kind == "sliding_attention")  # a window needs a mask, as padded rows do
    guess = kept_by_layer(shape, load) + _score_bytes(shape, load, 256, 2)
    assert guess == pytest.approx(two - one, rel=0.05)


def shape_of(family, **sizes):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](pad_token_id=0, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return dims_of(model, config, Settings(lora=LoraSettings(target_modules=families.OWN[family])))


@pytest.mark.parametrize(("shape", "load", "rows", "length", "measured"), [
    ("hybrid", LoadPlan("transformers", padded=True, chunked=True), 8, 1059, 27.2),
    ("moe", LoadPlan("transformers", padding_free=True, compiled=True, checkpointing=False), 1, 3008, 38.1),
    ("gpt_oss", LoadPlan("transformers", padded=True, chunked=True), 8, 1059, 51.7),
])  # fmt: skip
def test_other_families_need_what_was_measured_on_an_h200(shape, load, rows, length, measured):
    """By benchmarks/families.py, whose log is in benchmarks/LOG.md."""
    family, sizes = SHAPES[shape]
    assert estimate(shape_of(family, **sizes), load, rows, length).needed - CONTEXT == pytest.approx(measured, rel=0.15)


def test_a_hybrids_layers_keep_the_states_of_their_delta_nets_in_the_share_that_they_have():
    shape = shape_of("qwen3_5_text")  # Qwen3.5-9B style: 24 of 32 layers are gated delta nets
    assert (shape.parameters, shape.query_size, shape.key_value_size) == (8_953_803_264, 16 * 256 // 4, 4 * 256 // 4)
    heads, key, states = 32, 32 * 128, 32 * 128 * 128 // 64  # a state of 128 x 128 for each head and chunk of 64 tokens
    convolved, pairs = 2 * 16 * 128 + 32 * 128, 64 * heads
    delta = 7 * key + 3 * pairs + 3 * key + 2 * states + 2 * convolved
    assert shape.mixing == (24 * delta + 8 * 2 * 16 * 256) / 32  # and the attention's gate, and its result without it
    assert shape.mixing_float == 24 * (6 * key + 2 * pairs + 5 * key + states) / 32
    assert shape.norms == 8 * (16 * 256 + 4 * 256) / 32  # of the heads of attention layers
    assert shape.why_padded.startswith("its convolutions") and not shape.whole_logits


def test_a_text_model_with_heads_of_two_widths_and_parts_for_images_is_counted_by_its_own_layers():
    """A Gemma 4: one layer in two attends to all tokens, with wider heads; its values have a norm too."""
    layers = ["sliding_attention", "full_attention"] * 2
    text = dict(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=2, head_dim=16,
                num_key_value_heads=2, global_head_dim=32, layer_types=layers, vocab_size_per_layer_input=64,
                hidden_size_per_layer_input=8, num_kv_shared_layers=2, use_double_wide_mlp=True)  # fmt: skip
    image = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=12
    )
    shape = shape_of("gemma4", text_config=text, vision_config=image)
    assert (shape.num_hidden_layers, shape.query_size, shape.key_value_size) == (4, 2 * 24, 2 * 24)
    assert shape.intermediate_size == (80 + 80 + 160 + 160) / 4  # layers that share keys are wider
    # Five norms of hidden_size in each layer and one of its queries; in half of them also of their own keys and values.
    assert shape.norms == (5 - 2) * 48 + 48 + 48
    assert (shape.widest_head, shape.why_padded) == (32, "")


@pytest.mark.parametrize(("head", "gpu", "padded"), [(256, True, False), (512, True, True), (512, False, False)])
def test_heads_that_are_too_wide_for_the_gpus_attention_pad_the_rows_there(settings_of, head, gpu, padded):
    settings, machine = settings_of("model.backend=transformers"), Machine("H100", gpu, 80.0, 80.0, True)
    plan = plan_training(plan_model(settings, machine), settings, machine, replace(LLAMA_8B, widest_head=head), None, {})
    assert plan.padding_free == (not padded) and (f"heads of {head} values" in plan.why_padded) == padded


def test_experts_that_clamp_keep_twice_as_much_and_sinks_a_score_for_each_pair_of_tokens():
    shape = shape_of("gpt_oss", num_hidden_layers=24, num_local_experts=32)
    assert (shape.inner_results, shape.intermediate_size, shape.routed, shape.norms) == (6, 4 * 2880, 4 * 2880, 0)
    assert shape.sinks and "sinks" in shape.why_padded
    load = LoadPlan("transformers", adapter_bytes=4, padded=True, chunked=True)
    layer = 8 * 2880 + 2 * (3 * 4096 + 6 * 11520 + 3 * 2880 + 4096) + 2 * 11520
    assert kept_by_layer(shape, load) == layer
    # One layer is computed again: its own, its scores, and as much as three of them on the way back.
    scores, passing = 64 * 1000 * 2, 2 * (4 * 11520 + 2 * 2880 + 2 * 11520)
    kept = 24 * 2 * 2880 + 4 * 2 * 2880 + layer + scores + max(3 * scores, passing)
    assert estimate(shape, load, 8, 1000).activations == pytest.approx(8000 * kept / 2**30)


def test_padded_rows_have_a_mask_and_their_logits_a_chunk_at_a_time_unless_these_are_scaled():
    plain, padded = LoadPlan("transformers"), LoadPlan("transformers", padded=True)
    assert kept_by_layer(LLAMA_8B, padded) - kept_by_layer(LLAMA_8B, plain) == 2 * 2 * (4096 - 1024)  # keys and values repeated
    chunked = replace(padded, chunked=True)
    assert loss_bytes(LLAMA_8B, padded, 8000) == 12 * 8000 * 128256
    assert loss_bytes(LLAMA_8B, chunked, 8000) == 18 * 256 * 128256
    assert loss_bytes(replace(LLAMA_8B, whole_logits=True), chunked, 8000) == 12 * 8000 * 128256
    assert largest(padded, 3, [10, 8, 6, 4]) == (3, 10) and largest(replace(plain, padding_free=True), 3, [10, 8, 6]) == (1, 24)


@pytest.mark.parametrize("more", [(), ("method=dpo",), ("trainer.extra.loss_type=dft",), ("trainer.padding_free=null",)])
def test_the_loss_in_chunks_is_that_of_padded_rows_of_method_sft(settings_of, more):
    settings, machine = settings_of("trainer.padding_free=false", *more), Machine("H100", True, 80.0, 80.0, True)
    plan = replace(plan_model(settings, machine), backend="transformers", padding_free=settings.trainer.padding_free is None)
    load = load_plan_of(settings, plan, machine)
    assert (load.padded, load.chunked) == (more != ("trainer.padding_free=null",), more == ())


# Measured on one H100 80 GB with this shape (benchmarks/LOG.md). The rows were of uneven length (make_rows.py): the tokens of
# the largest pass, which the peak depends on, are the average over simulations of the same number of steps.
UNSLOTH = [
    (6.29, dict(bits=4, checkpointing=True), 1316),
    (15.79, dict(bits=16, checkpointing=True), 1316),
    (6.4, dict(bits=4, checkpointing=True), 2452),
    (13.7, dict(bits=4, checkpointing=False), 2452),
    (23.3, dict(bits=16, checkpointing=False), 2452),
    (41.4, dict(bits=16, checkpointing=False), 7814),
    (66.1, dict(bits=16, checkpointing=False), 14465),
    (17.6, dict(bits=16, checkpointing=False), 906),
]


@pytest.mark.parametrize(("measured", "load", "tokens"), UNSLOTH)
def test_unsloth_is_estimated_within_15_percent(measured, load, tokens):
    guess = estimate(LLAMA_8B, LoadPlan("unsloth", optim="adamw_8bit", **load), 1, tokens)
    assert guess.reserved == pytest.approx(measured, rel=0.15)


# Two rows of one length, 1B shape, by benchmarks/memory_table.py on an H100.
UNSLOTH_1B = [
    (1.55, dict(bits=4, checkpointing=True), 1024),
    (2.84, dict(bits=4, checkpointing=True), 8192),
    (3.52, dict(bits=4, checkpointing=False), 1024),
    (17.51, dict(bits=4, checkpointing=False), 8192),
    (2.85, dict(bits=16, checkpointing=True), 1024),
    (4.14, dict(bits=16, checkpointing=True), 8192),
    (4.84, dict(bits=16, checkpointing=False), 1024),
]


@pytest.mark.parametrize(("measured", "load", "length"), UNSLOTH_1B)
def test_a_smaller_shape_is_estimated_within_15_percent(measured, load, length):
    assert estimate(LLAMA_1B, LoadPlan("unsloth", **load), 2, length).reserved == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("measured", "rows", "length"), [(18, 2, 208), (26, 8, 192), (58, 32, 192)])
def test_stock_layers_are_estimated_within_5_percent(measured, rows, length):
    """Rows of one length, so that the tokens are exact: transformers and PEFT without mixed precision, adapter in bf16."""
    guess = estimate(LLAMA_8B, LoadPlan("transformers", checkpointing=False, adapter_bytes=2), rows, length)
    assert guess.reserved == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("measured", "compiled", "tokens"),
    [(56.9, False, 6144), (44.2, True, 6144), (30.6, True, 2944), (23.9, True, 1472), (22.0, True, 1024)],
)
def test_rows_end_to_end_are_estimated_within_5_percent(measured, compiled, tokens):
    """What tensors held at the peak of a forward and a backward pass (H100, bfloat16 base)."""
    load = LoadPlan("transformers", checkpointing=False, padding_free=True, compiled=compiled)
    assert estimate(LLAMA_8B, load, 1, tokens).allocated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "gpu", "each"),
    [((), True, 18), (("model.dtype=bfloat16",), True, 8), (("model.dtype=float32",), True, 16), ((), False, 16),
     (("trainer.optim=adamw_8bit",), True, 12)],
)  # fmt: skip
def test_weights_that_are_all_trained_are_kept_in_float32(settings_of, overrides, gpu, each):
    """Bytes a weight: float32 of itself, its gradient and two moments, and 16 bits of what is computed with."""
    settings, machine = settings_of("lora=none", *overrides), Machine("H100", gpu, 80.0, 80.0, True)
    load = load_plan_of(settings, plan_model(settings, machine), machine)
    full = replace(LLAMA_1B, trained=LLAMA_1B.parameters)
    guess = estimate(full, load, 1, 8)
    assert guess.weights + guess.trained == pytest.approx(each * LLAMA_1B.parameters / 2**30)


def test_what_a_layer_keeps_is_what_the_docstring_says():
    assert kept_by_layer(LLAMA_8B, LoadPlan("unsloth")) == 27 * 4096
    assert kept_by_layer(LLAMA_8B, LoadPlan("transformers", adapter_bytes=2)) == 45 * 4096
    assert kept_by_layer(LLAMA_8B, LoadPlan("transformers")) == 53 * 4096
    assert kept_by_layer(LLAMA_8B, LoadPlan("transformers", padding_free=True, compiled=True)) == 36 * 4096


@pytest.mark.parametrize("backend", ["unsloth", "transformers"])
def test_more_rows_longer_rows_more_bits_and_no_checkpointing_never_take_less(backend):
    for bits in (4, 8, 16):
        for checkpointing in (True, False):
            sizes = [estimate(LLAMA_8B, LoadPlan(backend, bits, checkpointing=checkpointing), n, 512).needed for n in (1, 2, 8)]
            assert sizes == sorted(sizes)
        on, off = (estimate(LLAMA_8B, LoadPlan(backend, bits, checkpointing=c), 4, 1024).needed for c in (True, False))
        assert on < off
    four, eight, sixteen = (estimate(LLAMA_8B, LoadPlan(backend, bits), 1, 512).weights for bits in (4, 8, 16))
    assert four < eight < sixteen


# ------------------------------------------------------------------------------------------------------ the split


EIGHT = [8, 4, 2, 1]


def settings(**options) -> Settings:
    return Settings(trainer=TrainerSettings(per_device_train_batch_size="auto", **options))


@pytest.mark.parametrize(
    ("gpu", "bits", "length", "rows", "checkpointing"),
    [("h100", 4, 256, 8, False), ("t4", 4, 512, 8, True), ("h100", 16, 4096, 8, True), ("l4", 16, 2048, 8, True)],
)
def test_auto_takes_the_most_rows_and_recomputes_only_where_it_has_to(gpu, bits, length, rows, checkpointing):
    capacity = CAPACITY[Gpu[gpu]]
    split, guess = fitting_batch_plan(LLAMA_8B, settings(), LoadPlan(bits=bits), [length] * 8, capacity, EIGHT)
    assert (split.per_device_train_batch_size, split.gradient_checkpointing) == (rows, checkpointing)
    assert split.effective_batch_size == 8 and guess.needed <= capacity


def test_auto_halves_the_rows_where_they_do_not_fit_and_ends_at_one():
    load = LoadPlan("transformers", bits=4)
    found = [fitting_batch_plan(LLAMA_8B, settings(), load, [2048] * 8, gib, EIGHT)[0] for gib in (60, 24, 16, 1)]
    assert [s.per_device_train_batch_size for s in found] == sorted(
        (s.per_device_train_batch_size for s in found), reverse=True
    )
    assert found[0].per_device_train_batch_size > 1 and found[-1] == BatchPlan(1, 8, True)
    assert fitting_batch_plan(LLAMA_8B, settings(gradient_checkpointing=False), load, [64] * 8, 1, EIGHT)[0] == BatchPlan(
        1, 8, False
    )


def test_rows_end_to_end_go_through_in_smaller_passes_before_anything_is_computed_twice():
    load = LoadPlan("transformers", padding_free=True)
    found = [fitting_batch_plan(LLAMA_8B, settings(), load, [2048] * 8, gib, EIGHT)[0] for gib in (150, 40, 17)]
    assert [(s.per_device_train_batch_size, s.gradient_checkpointing) for s in found] == [(8, False), (1, False), (1, True)]


def test_rows_end_to_end_compute_as_few_layers_again_as_the_memory_allows():
    load = LoadPlan("transformers", bits=4, padding_free=True, compiled=True)
    found = [fitting_batch_plan(LLAMA_8B, settings(), load, [2048] * 8, gib, EIGHT) for gib in (18, 17, 16, 15, 14, 12)]
    again = [
        replace(load, checkpointing=s.gradient_checkpointing, every_n_layers=s.every_n_layers).recomputed(32) for s, _ in found
    ]
    assert again == sorted(again) and again[0] == 0 and again[-1] == 32 and any(0 < n < 32 for n in again)
    assert all(guess.needed <= gib for (_, guess), gib in zip(found, (18, 17, 16, 15, 14, 12), strict=True))
    # Passes of few tokens pay for unpacking the weights: then more of them at once, computed again.
    assert [s.per_device_train_batch_size for s, _ in found][-1] > 1


def test_a_few_long_rows_do_not_make_every_micro_batch_small():
    load, long = LoadPlan("transformers", padding_free=True, compiled=True), [1200] * 8
    alike, mixed = (fitting_batch_plan(LLAMA_8B, settings(), load, rows, 22, EIGHT)[0] for rows in (long, long + [150] * 992))
    assert mixed.per_device_train_batch_size > alike.per_device_train_batch_size


def test_what_a_micro_batch_costs_is_what_was_measured():
    """On an H200 in bf16 2 to 16 rows a step, in one micro-batch (benchmarks/grid.py), and on an H100 in 16 GiB in 4 bits one
    row of 2,017 tokens with one layer of three recomputed beside 4 and 8 rows with all of them (benchmarks/LOG.md)."""
    measured = json.loads((ROOT / "benchmarks/results/grids/h200.json").read_text(encoding="utf-8"))
    rates = {rows: rate for rows, (rate, _) in grid.medians(measured["results"]["rows"]["bf16"], 25).items()}
    load = LoadPlan("transformers", checkpointing=False)
    costs = {rows: cost(LLAMA_8B, load, rows * 181) for rows in (2, 4, 8, 16)}
    assert all(costs[rows] / costs[16] == pytest.approx(rates[16] / rates[rows], rel=0.1) for rows in costs)
    some, whole = (LoadPlan("transformers", bits=4, every_n_layers=n) for n in (3, 1))
    one, four, eight = cost(LLAMA_8B, some, 2017), cost(LLAMA_8B, whole, 4 * 2017), cost(LLAMA_8B, whole, 8 * 2017)
    assert [four / one, eight / one] == pytest.approx([10952 / 10206, 10952 / 10370], rel=0.05)


@pytest.mark.parametrize("wanted", [True, False])
def test_checkpointing_that_is_asked_for_is_of_every_layer_or_of_as_many_as_are_named(wanted):
    load = LoadPlan("transformers", bits=4, padding_free=True, compiled=True)
    asked = settings(gradient_checkpointing=wanted)
    assert fitting_batch_plan(LLAMA_8B, asked, load, [2048] * 8, 15, EIGHT)[0].every_n_layers == 1
    named = settings(extra={"gradient_checkpointing_kwargs": {"every_n_layers": 4}})
    split, _ = fitting_batch_plan(LLAMA_8B, named, replace(load, every_n_layers=4), [2048] * 8, 15, EIGHT)
    assert (split.gradient_checkpointing, split.every_n_layers) == (True, 4)
    ready = with_batch_plan(Settings(trainer=named.trainer), split)
    assert ready.trainer.extra["gradient_checkpointing_kwargs"] == {"use_reentrant": False, "every_n_layers": 4}


def test_tokens_of_a_pass_are_padded_or_laid_end_to_end():
    assert tokens_at_once(LoadPlan("transformers"), 3, [10, 8, 6, 4]) == 30
    assert tokens_at_once(LoadPlan("unsloth"), 3, [10, 8, 6, 4]) == 24
    assert tokens_at_once(LoadPlan("transformers", padding_free=True), 3, [10, 8, 6, 4]) == 24


def test_passes_make_up_the_effective_batch_evenly():
    assert (
        candidates(settings(effective_batch_size=12).trainer) == [12, 6, 4, 3, 2, 1] and candidates(settings().trainer)[0] == 8
    )
    plain = TrainerSettings(per_device_train_batch_size=2)
    assert batch_plan_of(plain) == BatchPlan(2, 4, None)
    assert batch_plan_of(TrainerSettings(per_device_train_batch_size=2, effective_batch_size=16)) == BatchPlan(2, 8, None)
    assert batch_plan_of(TrainerSettings(per_device_train_batch_size=3, gradient_accumulation_steps=5)) == BatchPlan(3, 5, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(per_device_train_batch_size=3, effective_batch_size=8), "trainer.per_device_train_batch_size=2"),
        (dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, effective_batch_size=8), "accumulation_steps=null"),
        (dict(per_device_train_batch_size="auto", gradient_accumulation_steps=2), "accumulation_steps=null"),
        (dict(per_device_train_batch_size="most"), "trainer.per_device_train_batch_size=auto"),
        (dict(per_device_train_batch_size=2, effective_batch_size=1), "trainer.per_device_train_batch_size=1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_what_mends_them(options, words):
    (problem,) = check_batch_plan(TrainerSettings(**options))
    assert words in problem.fix and all(f"{key}={value}" in problem.what for key, value in options.items())
    argv = [f"trainer.{key}={value}" for key, value in options.items()]
    type_hints(argv, [problem], lambda command: check_batch_plan(make_settings(*command).trainer))


@pytest.mark.parametrize(
    "options",
    [{}, {"effective_batch_size": 16}, {"gradient_accumulation_steps": 4, "effective_batch_size": 8},
     {"per_device_train_batch_size": "auto"}, {"per_device_train_batch_size": "auto", "effective_batch_size": 3}],
)  # fmt: skip
def test_settings_that_agree_are_taken(options):
    assert check_batch_plan(TrainerSettings(**options)) == []
