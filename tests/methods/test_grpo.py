"""Group relative policy optimisation: advantages, weights and losses by hand, layouts, and TRL's own trainer on the same
completions.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from sft.config.schema import MethodLoss, MethodSettings, ScaleRewards
from sft.data.collators import PaddingFreeCollator
from sft.data.shared_prompt import SharedPromptCollator
from sft.methods.answers import TAKEN, difference, padded, token_log_probs
from sft.methods.grpo import OF_LOSS, CompletionCollator, Item, kl_from, micro_batches, token_losses, weight_of
from sft.methods.rollouts import Group, Scored, compare, facts_of, keys_of, line_of, means_of
from sft.plan.plan import Plan
from tests.conftest import make_settings
from tests.methods.test_dpo import PAD, make_model


def group_of(rewards: list[float], lengths: list[int] | None = None, prompt: int = 4, seed: int = 0) -> Group:
    draw = torch.Generator().manual_seed(seed)
    lengths = lengths or [3] * len(rewards)
    ids = [torch.randint(1, 4000, (n,), generator=draw).tolist() for n in (prompt, *lengths)]
    scored = [
        Scored(some, [-1.0] * len(some), True, "", [reward], reward) for some, reward in zip(ids[1:], rewards, strict=True)
    ]
    return Group(1 + seed, ids[0], scored)


def advantages(rewards, scale, others=()):
    group = group_of(list(rewards))
    compare([group], MethodSettings(scale_rewards=scale), [*rewards, *others])
    return [one.advantage for one in group.completions]


def test_advantages_are_those_worked_out_by_hand():
    std = math.sqrt(4 * 0.25 / 3)  # of 0, 0, 1, 1 with one less below the line
    expected = [-0.5 / (std + 1e-4)] * 2 + [0.5 / (std + 1e-4)] * 2
    assert advantages([0, 0, 1, 1], ScaleRewards.group) == pytest.approx(expected, rel=1e-9)
    assert advantages([0, 0, 1, 1], ScaleRewards.none) == [-0.5, -0.5, 0.5, 0.5]
    std = math.sqrt(sum((x - 0.6) ** 2 for x in (0, 0, 1, 1, 1)) / 4)
    assert advantages([0, 0, 1, 1], ScaleRewards.batch, [1]) == pytest.approx(
        [-0.5 / (std + 1e-4)] * 2 + [0.5 / (std + 1e-4)] * 2
    )


@pytest.mark.parametrize("scale", list(ScaleRewards))
def test_equal_rewards_have_an_advantage_of_exactly_zero(scale):
    assert advantages([0.1, 0.1, 0.1], scale, [5.0, 2.0]) == [0.0, 0.0, 0.0]
    assert not group_of([0.1] * 7).std


def test_a_token_weighs_what_each_loss_says():
    long, cut = Scored([1] * 8, [], True, ""), Scored([1] * 2, [], False, "")

    def weights(kind, **more):
        method = MethodSettings(loss_type=kind, max_completion_length=16, **more)
        return [weight_of(one, method, 40, 5) for one in (long, cut)]

    assert weights(MethodLoss.dapo) == weights(MethodLoss.bnpo) == [1 / 40, 1 / 40]
    assert weights(MethodLoss.grpo) == [1 / (8 * 5), 1 / (2 * 5)]
    assert weights(MethodLoss.dr_grpo) == [1 / (5 * 16), 1 / (5 * 16)]
    assert weights(MethodLoss.dapo, mask_truncated_completions=True) == [1 / 40, 0.0]


def test_ratios_are_bounded_where_that_holds_the_update_back():
    """Ratios of 1.5, 0.5, 1.5, 0.5 and 1.1, with epsilon 0.2 below and 0.3 above."""
    ratios, signs = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]), torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0])
    losses, clipped = token_losses(old + ratios.log(), old, signs, MethodSettings(epsilon=0.2, epsilon_high=0.3))
    assert losses.tolist() == pytest.approx([-2.6, -1.0, 3.0, 1.6, -2.2], rel=1e-5)
    assert clipped.tolist() == [True, False, False, True, False]


def test_the_divergence_from_the_reference_is_never_below_zero():
    found = kl_from(torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -2.0]))
    assert found.tolist() == pytest.approx([0.0, math.exp(-1), math.e - 2], rel=1e-5)


def test_means_are_over_completions_groups_and_tokens():
    groups = [group_of([0.0, 1.0], [2, 4]), group_of([1.0, 1.0], [6, 8], seed=1)]
    groups[0].completions[0].ended = False
    found = means_of(facts_of(groups, ["number"]), ["number"])
    assert found == pytest.approx({"reward": 0.75, "ended": 0.75, "length": 5.0, "reward_std": math.sqrt(0.5) / 2,
                                   "zero_groups": 0.5, "entropy": 1.0, "reward/number": 0.75})  # fmt: skip
    assert means_of(facts_of([], ["number"]), ["number"]) == {}


def test_each_completion_of_each_prompt_and_rollout_draws_by_a_key_of_its_own():
    settings = make_settings("method=grpo", "method.num_generations=4")
    entries = [{"row": row} for row in (3, 9)]
    found = [key for rollout in (0, 1) for some in keys_of(settings, rollout, entries) for key in some]
    assert len(set(found)) == 16 and found[4:8] == keys_of(settings, 0, entries[1:])[0], "not by what else is in the step"
    other = make_settings("method=grpo", "method.num_generations=4", "seed=1")
    assert not {key for some in keys_of(other, 0, entries) for key in some} & set(found)


def test_a_line_of_a_rollout_holds_what_was_said_and_what_it_earned():
    group = group_of([0.25, 1.0])
    compare([group], MethodSettings(), [])
    line = line_of(group, 7, ["number"], "What?")
    assert (line["step"], line["row"], line["prompt"]) == (7, 1, "What?")
    assert line["completions"][1]["rewards"] == {"number": 1.0} and line["completions"][1]["advantage"] > 0
    assert line["completions"][0]["finish"] == "ended" and line["completions"][0]["tokens"] == 3


# ------------------------------------------------------------------------------------------------- layouts

LAYOUTS = (SharedPromptCollator(PAD, 64), PaddingFreeCollator(PAD, 64), padded(PAD))


def items_of(sizes: list[int], method: MethodSettings) -> list[Item]:
    groups = [
        group_of([float(i % 3) for i in range(n)], [2 + i % 4 for i in range(n)], 3 + at, at) for at, n in enumerate(sizes)
    ]
    compare(groups, method, [])
    count = sum(sizes)
    return [Item(at, group.prompt_ids, one, weight_of(one, method, 100, count))
            for at, group in enumerate(groups) for one in group.completions]  # fmt: skip


def loss_of(model, batch, method) -> torch.Tensor:
    found = token_log_probs(model, {k: x for k, x in batch.items() if k not in OF_LOSS}, method.temperature)
    losses, _ = token_losses(found, batch.get("old", found.detach()), batch["advantages"], method)
    return (losses * batch["weights"]).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sizes", [[2, 3], [8, 1, 4]])
def test_shared_prompts_separate_rows_and_padded_ones_have_one_loss_and_gradient_however_they_are_split(sizes, temperature):
    model, method = make_model(moved=True), MethodSettings(temperature=temperature)
    items, found = items_of(sizes, method), []
    for layout in LAYOUTS:
        for size in (len(items), 3, 1):  # a group can be cut as well
            model.zero_grad()
            total = 0.0
            for at in range(0, len(items), size):
                loss = loss_of(model, CompletionCollator(layout)(items[at : at + size]), method)
                loss.backward()
                total += loss.item()
            found.append((total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert found[0][1].norm() > 1e-3
    for total, grads in found[1:]:
        assert total == pytest.approx(found[0][0], abs=1e-6)
        assert torch.allclose(grads, found[0][1], atol=1e-6)


def test_a_completion_that_sees_another_one_is_found_out(monkeypatch):
    """The second answer is given the keys of the first in place of the prompt's."""
    model, items = make_model(moved=True), items_of([3, 2], MethodSettings())
    batches = [{k: x for k, x in CompletionCollator(layout)(items).items() if k in TAKEN} for layout in LAYOUTS[:2]]
    counts = [len(item.scored.ids) for item in items]
    plan = Plan(padding_free=True)
    assert difference(model, plan, dict(batches[0]), dict(batches[1]), counts) == ""
    leak = batches[0]["key_index"].clone()
    first = len(items[0].prompt_ids) + len(items[0].scored.ids)
    leak[first] = len(items[0].prompt_ids)
    assert "would not be what it is alone" in difference(model, plan, {**batches[0], "key_index": leak}, batches[1], counts)


def test_the_gradient_of_a_shared_prompt_is_the_sum_of_its_parts():
    from sft.model.shared_keys import gather_keys

    batch = SharedPromptCollator(PAD, 64).lay_out([([item.row for item in items_of([5], MethodSettings())], 3)])
    tokens = batch["input_ids"].shape[1]
    x = torch.randn(tokens, 2, 3, dtype=torch.double, requires_grad=True)
    weights = torch.randn(len(batch["key_index"]), 2, 3, dtype=torch.double)
    (gather_keys(x, batch["key_index"], batch["key_uses"]) * weights).sum().backward()
    expected = torch.zeros_like(x).index_add(0, batch["key_index"], weights)
    assert torch.allclose(x.grad, expected) and batch["key_uses"].shape == (5, tokens)


def test_micro_batches_hold_the_groups_with_variance_and_a_filler_where_none_is_left():
    groups = [group_of([0.0, 1.0]), group_of([1.0, 1.0], seed=1), group_of([0.5, 0.0], seed=2), group_of([0.0, 0.0], seed=3)]
    rollout = SimpleNamespace(groups=groups, tokens=24, completions=8)
    parts = micro_batches(rollout, MethodSettings(loss_type=MethodLoss.dapo), 1, 4, PAD)
    assert sorted(item.row_number for part in parts for item in part) == [0, 0, 1, 1, 3, 3] and [
        len(part) for part in parts[2:]
    ] == [1, 1]
    model = make_model(moved=True)
    loss = loss_of(model, CompletionCollator(LAYOUTS[0])(parts[3]), MethodSettings())
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
