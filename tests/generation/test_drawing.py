"""Completions that are drawn: from the right distribution, by counters alone, with the log probabilities of the model."""

import math

import pytest
import torch

from sft.generation import batching, by_generate
from sft.generation.decoding import Decoder
from sft.generation.drawing import Drawing, draw, key_of, uniform
from sft.plan import plan


def small_model(kind="llama", vocabulary=64):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=None)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data.mul_(8)  # else all tokens are about as likely
    return model


def complete(model, prompts, keys, limit=12, stops=(), temperature=1.0, decoder=None):
    rows, places = sum(map(len, keys)), max(map(len, prompts)) + limit
    decoder = decoder or Decoder(model, rows, places)
    with torch.no_grad():
        return decoder.complete(prompts, set(stops), limit, lambda: None, Drawing(temperature, keys))


def keys_of(prompts, completions, seed=0):
    return [[key_of(seed, prompt, i) for i in range(completions)] for prompt in range(prompts)]


def test_twenty_thousand_draws_have_the_distribution_of_the_logits():
    shares = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01])
    keys = torch.tensor([key_of(7, 1, i) for i in range(20_000)])
    tokens, log_probs = draw((shares.log() + 5).expand(20_000, -1), keys, torch.tensor([3]))
    counts = torch.bincount(tokens, minlength=6)
    chi_square = float(((counts - 20_000 * shares) ** 2 / (20_000 * shares)).sum())
    assert chi_square < 20.5  # of 5 degrees of freedom; one in a thousand draws is beyond
    assert torch.allclose(log_probs, shares.log()[tokens], atol=1e-6)


def test_a_token_that_cannot_be_is_never_drawn():
    """Also where the number that is drawn is 0, or as near to 1 as it comes."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf]).expand(5000, -1)
    tokens, log_probs = draw(logits, torch.tensor([key_of(i) for i in range(5000)]), torch.tensor([0]))
    assert set(tokens.tolist()) == {1, 3} and torch.isfinite(log_probs).all()
    for drawn in (0.0, 1 - 2.0**-32):
        passed = torch.softmax(logits[:1], -1).double().cumsum(-1)
        at = int(torch.searchsorted(passed, drawn * passed[:, -1:], right=True))
        assert at == (1 if drawn == 0 else 3)


def test_the_numbers_are_spread_evenly_over_keys_and_places():
    for keys, places in ((20_000, 1), (4, 5_000)):
        rows = torch.tensor([key_of(1, i) for i in range(keys)])
        found = torch.cat([uniform(rows, torch.tensor([place])) for place in range(places)])
        assert float(found.min()) >= 0 and float(found.max()) < 1
        counts = torch.histc(found, 20, 0, 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # of 19 degrees of freedom; one in a thousand is beyond
        assert abs(float(torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1])) < 0.025


@pytest.mark.parametrize("change", ["seed", "prompt", "completion", "place"])
def test_each_counter_changes_the_draw(change):
    def number(**counters):
        n = dict(seed=1, prompt=2, completion=3, place=4) | counters
        return float(uniform(torch.tensor([key_of(n["seed"], n["prompt"], n["completion"])]), torch.tensor([n["place"]])))

    assert number() == number() != number(**{change: 9})


@pytest.mark.parametrize("kind", plan.PADDING_FREE_KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_drawn_tokens_are_those_of_a_forward_pass(kind, temperature):
    """Prompts of unlike lengths, each completed five times; some completions end and leave the batch."""
    model = small_model(kind)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
    found = complete(model, prompts, keys_of(3, 5), stops=range(1, 9), temperature=temperature)
    assert len({len(one.ids) for some in found for one in some}) > 3
    for prompt, some in zip(prompts, found, strict=True):
        assert len({tuple(one.ids) for one in some}) > 1
        for one in some:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1] / temperature
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(one.log_probs), expected, atol=1e-4)
            assert one.ended == (one.ids[-1] in range(1, 9)) and (one.ended or len(one.ids) == 12)


def test_a_draw_is_the_same_alone_and_among_sixty_four():
    model, prompts = small_model(), [[5 + i, 20, 30][: 1 + i % 3] for i in range(8)]
    keys = keys_of(8, 8)
    together = complete(model, prompts, keys, stops=(1, 2))
    alone = [[complete(model, [prompt], [[key]], stops=(1, 2))[0][0] for key in some]
             for prompt, some in zip(prompts, keys, strict=True)]  # fmt: skip
    assert [[one.ids for one in some] for some in together] == [[one.ids for one in some] for some in alone]


def test_a_decoder_serves_again_after_the_adapter_was_trained():
    """What it keeps of an adapter for captured steps is read anew."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft_model = get_peft_model(small_model(), lora).eval()
    model, prompts, keys = peft_model.get_base_model(), [[5, 6, 7], [8]], keys_of(2, 4)
    decoder = Decoder(model, 8, 20, trained=True)
    before = complete(model, prompts, keys, decoder=decoder)
    assert complete(model, prompts, keys, decoder=decoder) == before
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    after = complete(model, prompts, keys, decoder=decoder)
    assert after == complete(model, prompts, keys) and [one.ids for one in after[0]] != [one.ids for one in before[0]]


def test_generate_draws_the_same_where_the_decoder_cannot():
    model, prompts, keys = small_model(), [[5, 6, 7, 8], [9, 10]], keys_of(2, 6)
    expected = complete(model, prompts, keys, stops=(1, 2, 3))
    with torch.no_grad():
        found = by_generate.Decoder(model, 12, 16).complete(prompts, {1, 2, 3}, 12, lambda: None, Drawing(1.0, keys))
        likeliest = by_generate.Decoder(model, 2, 16).complete(prompts, {1}, 12, lambda: None)
        assert [[one.ids for one in some] for some in likeliest] == [
            [one.ids for one in some] for some in Decoder(model, 2, 16).complete(prompts, {1}, 12, lambda: None)
        ]
    assert [[one.ids for one in some] for some in found] == [[one.ids for one in some] for some in expected]
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4) and one.ended == other.ended


def test_a_stop_gives_up_a_rollout():
    class Stop(Exception):
        pass

    asked = []

    def check():
        asked.append(1)
        if len(asked) == 3:
            raise Stop

    decoder = Decoder(small_model(), 4, 20)
    with torch.no_grad(), pytest.raises(Stop):
        decoder.complete([[5, 6]], set(), 16, check, Drawing(1.0, keys_of(1, 4)))
    assert not any("forward" in vars(module) for module in decoder.model.modules()), "the layers are as they were"


def test_prompts_are_put_through_the_model_a_part_at_a_time(monkeypatch):
    from sft.generation import decoding

    model, prompts, keys = small_model(), [[5, 6, 7], [8], [9, 10], [11]], keys_of(4, 3)
    whole = complete(model, prompts, keys)
    monkeypatch.setattr(decoding, "PREFILLED", 6)
    assert [[one.ids for one in some] for some in complete(model, prompts, keys)] == [
        [one.ids for one in some] for some in whole
    ]


def test_padding_on_the_left_comes_up_to_a_length():
    ids, mask = batching.padded([[1, 2]], 0, "cpu", 4)
    assert ids.tolist() == [[0, 0, 1, 2]] and mask.tolist() == [[0, 0, 1, 1]]
