"""Answers to several prompts at once are those to each alone."""

import copy
import types

import pytest
import torch

from sft.export import measure
from sft.generation import batching, decoding, samples
from sft.generation.samples import Prompt
from sft.model import fused_layers, loading
from sft.model import tokenizer as model_tokenizer
from sft.plan import plan
from sft.plan.plan import Plan
from tests.conftest import SMALL, make_settings


@pytest.fixture(scope="module")
def tiny(all_tokens):
    settings = make_settings(*SMALL, "samples.max_new_tokens=12")
    tokenizer, stop_ids = model_tokenizer.load_tokenizer(settings.model)
    return settings, tokenizer, stop_ids, loading.load_model(settings, Plan())[0]


def answers(tiny, stop_ids, at_once, monkeypatch):
    settings, tokenizer, _, model = tiny
    monkeypatch.setattr(samples, "at_once", lambda backend: at_once)
    prompts = [Prompt(i, "config", list(range(20 * i + 5, 20 * i + 7 + 3 * i)), f"q{i}", None) for i in range(5)]
    return samples.generate(model, tokenizer, prompts, settings, stop_ids, 0)


@pytest.mark.parametrize("at_once", [2, 8])
def test_answers_at_once_are_those_one_by_one(tiny, monkeypatch, at_once):
    alone = answers(tiny, tiny[2], 1, monkeypatch)
    assert answers(tiny, tiny[2], at_once, monkeypatch) == alone
    assert [line["index"] for line in alone] == list(range(5)) and {line["finish"] for line in alone} == {"length"}


def test_the_models_own_penalties_are_left_out(tiny, monkeypatch):
    """Qwen's chat models bring one for repetitions, which transformers adds to whatever is asked of them."""
    model = tiny[3]
    expected = answers(tiny, tiny[2], 1, monkeypatch)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 9.0)
    ids = torch.tensor([list(range(25, 30))])
    said, penalised = (model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, **more)[0].tolist()
                       for more in ({"repetition_penalty": 1.0}, {}))  # fmt: skip
    assert said != penalised, "else nothing could be seen"
    assert answers(tiny, tiny[2], 1, monkeypatch) == answers(tiny, tiny[2], 8, monkeypatch) == expected
    assert model.generation_config.repetition_penalty == 9.0


def test_an_export_is_asked_several_prompts_at_once_and_answers_as_to_each_alone(tiny, monkeypatch):
    model = tiny[3]
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 9.0)
    lengths = [4, 9, 2, 7, 5, 3, 8, 6, 4, 5]
    rows = [measure.HeldOutRow("held_out", list(range(9 * i + 5, 9 * i + 15)), [-100] * 7 + [1] * 3, n, "?", "")
            for i, n in enumerate(lengths)]  # fmt: skip
    said = measure.measure_torch(model, rows, 10, 12, [], 0).completions
    stops = [said[1][5]]
    together = measure.measure_torch(model, rows, 10, 12, stops, 0)
    monkeypatch.setattr(measure, "AT_ONCE", 1)
    alone = measure.measure_torch(model, rows, 10, 12, stops, 0)
    assert together.completions == alone.completions and together.finished == alone.finished and len(said) == 10
    assert alone.finished[1] and not all(alone.finished), "one of several ends before the others"
    assert [len(tops) for tops in together.tops] == [len(answer) for answer in together.completions]
    for one, other in zip(together.tops, alone.tops, strict=True):
        assert [list(top) for top in one] == [list(top) for top in other]
        assert all(a[token] == pytest.approx(b[token], abs=1e-4) for a, b in zip(one, other, strict=True) for token in a)
    for answer, tops in zip(together.completions, together.tops, strict=True):
        assert answer == [max(top, key=top.get) for top in tops], "the likeliest tokens, whatever the model's own penalties"


def test_long_prompts_are_answered_in_smaller_groups(monkeypatch):
    monkeypatch.setattr(batching, "PLACES", 30)
    prompts = [[0] * n for n in (2, 3, 4, 12, 2, 2, 2, 2, 40)]
    assert [[len(one) for one in group] for group in batching.grouped(prompts, 6, 3)] == [[2, 3, 4], [12], [2, 2, 2], [2], [40]]


def test_an_answer_that_ends_before_the_others_is_cut_at_its_end(tiny, monkeypatch):
    _, tokenizer, _, model = tiny
    ids = torch.tensor([list(range(25, 30))])
    with torch.no_grad():
        said = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    stop = next(token for i, token in enumerate(said) if token not in said[:i] and i >= 2)  # the second prompt's own
    alone, together = (answers(tiny, {stop}, count, monkeypatch) for count in (1, 8))
    assert together == alone and alone[1]["finish"] == "eos"
    assert alone[1]["completion"] == tokenizer.decode(said[: said.index(stop) + 1])
    assert any(line["finish"] == "length" for line in alone), "else nothing had to be padded"


@pytest.mark.parametrize("kind", plan.PADDING_FREE_KINDS)
def test_answers_of_a_cache_of_fixed_size_are_those_of_generate(kind):
    """What a GPU records, launched step by step: the same tokens, prompts of unlike lengths among them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=None)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).eval().get_base_model()
    for name, weight in model.named_parameters():
        if "norm" in name:  # those that begin at one are all alike
            torch.nn.init.normal_(weight, std=0.5)
    ids, mask = torch.randint(3, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 4, 8)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    looks = []
    with torch.no_grad():
        expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None,
                                  pad_token_id=0)[:, 9:].tolist()  # fmt: skip
        assert decoding.fits(model)
        prompts = [row[padding:] for row, padding in zip(ids.tolist(), (0, 4, 8), strict=True)]
        assert decoding.greedy(model, prompts, {64}, 20, lambda: looks.append(1)) == expected and len(looks) == 19
        stops = {expected[0][3], expected[1][5], expected[2][8]}
        ended = decoding.greedy(model, prompts, stops, 20, lambda: looks.append(1))
    assert ended == [batching.until_end(answer, stops) for answer in expected]
    assert len({len(answer) for answer in ended}) > 1 and len(looks) == 19 + max(map(len, ended))

    with fused_layers.fused_inference(model):
        changed = [module for module in model.modules() if "forward" in vars(module)]
    kinds = {type(module).__name__ for module in changed}
    assert "Linear" in kinds and len(kinds) == 2
    assert not any("forward" in vars(module) for module in model.modules())


def test_attention_of_one_token_is_that_of_transformers():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, places, 8) for heads, places in ((6, 1), (2, 5), (2, 5)))
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()[:, None, None]
    layer = types.SimpleNamespace(num_key_value_groups=3)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3, is_causal=False)
    found, _ = decoding.attend(query, key.transpose(1, 2), value.transpose(1, 2), mask, scaling=0.3)
    assert found.shape == (2, 1, 6, 8) and torch.allclose(found, expected, atol=1e-6)


def test_an_adapter_that_has_learnt_nothing_yet_takes_no_kernels(tiny):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(tiny[3]), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        alone = model.get_base_model()(input_ids=ids).logits
        layers = [module for module in model.modules() if hasattr(module, "lora_B")]
        for layer in layers[1:]:
            layer.lora_A["default"].weight.fill_(float("nan"))  # which would be seen in the logits
        with fused_layers.fused_inference(model):
            assert torch.allclose(model(input_ids=ids).logits, alone, atol=1e-5)
        layers[1].lora_B["default"].weight.fill_(1.0)
        with fused_layers.fused_inference(model):
            assert model(input_ids=ids).logits.isnan().any()


def test_a_model_that_forgets_tokens_is_not_asked_that_way():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                           num_key_value_heads=2, sliding_window=8)  # fmt: skip
    assert not decoding.fits(MistralForCausalLM(config))
    config._attn_implementation = "eager"
    config.sliding_window = None
    assert not decoding.fits(MistralForCausalLM(config))


def test_answers_together_are_asked_that_way_and_else_by_generate(tiny, monkeypatch):
    alone, asked = answers(tiny, tiny[2], 1, monkeypatch), []
    usual = decoding.greedy
    monkeypatch.setattr(decoding, "greedy", lambda *args: asked.append(1) or usual(*args))
    assert answers(tiny, tiny[2], 8, monkeypatch) == alone and asked == [1]

    def broken(*args):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "greedy", broken)
    assert answers(tiny, tiny[2], 8, monkeypatch) == alone
