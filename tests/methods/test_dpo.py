"""Preferences: the loss is TRL's on the same tokens, however the rows are laid out and split; the data is what it says."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from sft.config.method import DPO
from sft.config.schema import MethodLoss, MethodSettings, Settings
from sft.data.collators import PaddingFreeCollator
from sft.data.prepare import prepare
from sft.data.shared_prompt import SharedPromptCollator, shared_length
from sft.data.tokenize import IGNORED
from sft.errors import Refusal
from sft.methods.dpo import PairCollator, _difference, cut_pairs, fell_far, log_probs, padded, pair_facts, pair_losses
from sft.model import builtin
from sft.model.padding_free import attend, install
from sft.plan.plan import Plan
from tests.conftest import make_settings
from tests.data.miniatures import assistant, user

PAD = 0


LAYOUTS = (SharedPromptCollator(PAD, 64), PaddingFreeCollator(PAD, 64), padded(PAD))


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def make_model(moved: bool = False):
    """A tiny model with a fresh adapter, or one that is not at rest; it takes padding-free rows as well."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(builtin.local_model(builtin.TINY_RANDOM), dtype=torch.float32)
    install(base)
    made = get_peft_model(base, LoraConfig(**LORA))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if moved and "lora_B" in name:
                weight.normal_(std=0.1)
    return made


@pytest.fixture
def model():
    return make_model()


def make_pairs(count: int = 4, seed: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    pairs = []
    for n in range(count):
        prompt = torch.randint(1, 4000, (3 + n,), generator=draw).tolist()
        answers = [torch.randint(1, 4000, (2 + 3 * n % 5 + k,), generator=draw).tolist() for k in (0, 2)]
        rows = [(prompt + answer, [IGNORED] * len(prompt) + answer) for answer in answers]
        pair = {"input_ids": rows[0][0], "labels": rows[0][1], "rejected_ids": rows[1][0], "rejected_labels": rows[1][1]}
        pairs.append(pair | {"shared_length": shared_length(pair)})
    return pairs


def with_reference(model, pairs: list[dict]) -> list[dict]:
    with torch.no_grad(), model.disable_adapter():
        found = log_probs(model, PairCollator(PaddingFreeCollator(PAD, 64))(pairs))[0].tolist()
    return [pair | {"reference": reference} for pair, reference in zip(pairs, found, strict=True)]


def trl_trainer(method: MethodSettings, tokenizer, folder):
    base = AutoModelForCausalLM.from_pretrained(builtin.local_model(builtin.TINY_RANDOM), dtype=torch.float32)
    args = DPOConfig(str(folder), loss_type=[method.loss_type.value], beta=method.beta, report_to="none", use_cpu=True,
                     label_smoothing=method.label_smoothing, gradient_checkpointing=False, bf16=False)  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    return DPOTrainer(base, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(**LORA))


def trl_batch(pairs: list[dict]) -> dict:
    """TRL's own form: the chosen answers, then the rejected ones."""
    rows = [(p["input_ids"], p["labels"]) for p in pairs] + [(p["rejected_ids"], p["rejected_labels"]) for p in pairs]
    batch = padded(PAD)([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
            "completion_mask": (batch["labels"] != IGNORED).long()}  # fmt: skip


def our_loss(model, pairs: list[dict], method: MethodSettings, rows) -> torch.Tensor:
    batch = PairCollator(rows)(pairs)
    policy, lengths = log_probs(model, batch)
    return pair_losses(policy, batch["reference"], lengths, method).sum() / len(pairs)


LLAMA = ("model=llama3_1_8b_instruct",)
OWN = ("dataset=local", "dataset.path=pairs.json")


@pytest.mark.parametrize(
    ("words", "epochs"),
    [((), 0.5), (LLAMA, 1), (OWN, 1), (("trainer=long",), 3), (("trainer.num_train_epochs=1",), 1), (("trainer=quick",), 1)],
)
def test_a_part_of_an_epoch_is_for_the_shipped_pairs_on_a_built_in_model_alone(words, epochs):
    made = make_settings("method=dpo", *words)
    assert made.trainer.num_train_epochs == epochs and made.dataset.name == (None if words == OWN else "twist_pairs")
    assert made.trainer.learning_rate == (5e-6 if words == LLAMA else 2e-4)


@pytest.mark.parametrize("kind", [MethodLoss(name) for name in DPO.losses])
def test_the_loss_of_each_kind_is_trls_through_training(model, tokenizer, tmp_path, kind):
    """Five steps of AdamW on the same pairs from the same weights: losses within 1e-5 and gradients within 1e-4."""
    method = MethodSettings(loss_type=kind, label_smoothing=0.1 if kind == MethodLoss.robust else 0.0)
    trainer, ours = trl_trainer(method, tokenizer, tmp_path), make_model()
    theirs = trainer.model
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    pairs = with_reference(ours, make_pairs())
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (theirs, ours)]
    for _ in range(5):
        found = trainer.compute_loss(theirs, trl_batch(pairs))
        loss = our_loss(ours, pairs, method, SharedPromptCollator(PAD, 64))
        assert loss.item() == pytest.approx(found.item(), abs=1e-5, rel=1e-6)
        for one, value in zip(steps, (found, loss), strict=True):
            one.zero_grad()
            value.backward()
        norms = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]).norm() for m in (theirs, ours)]
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-4)
        for one in steps:
            one.step()


def test_before_the_first_step_a_pair_is_a_tie(model):
    pairs = with_reference(model, make_pairs())
    batch = PairCollator(PaddingFreeCollator(PAD, 64))(pairs)
    policy, lengths = log_probs(model, batch)
    losses = pair_losses(policy, batch["reference"], lengths, MethodSettings())
    loss, accuracy, margin, *_ = (pair_facts(policy, batch["reference"], losses, 0.1) / len(pairs)).tolist()
    assert loss == pytest.approx(0.6931472, abs=1e-6) and accuracy == 0.5 and margin == 0


def test_padded_rows_and_any_split_into_micro_batches_have_the_same_loss_and_gradients():
    model = make_model(moved=True)
    pairs, found = with_reference(model, make_pairs(6)), []
    for rows in LAYOUTS:
        for size in (6, 2, 1):
            model.zero_grad()
            total = 0.0
            for at in range(0, 6, size):
                part = pairs[at : at + size]
                loss = our_loss(model, part, MethodSettings(), rows) * len(part) / 6
                loss.backward()
                total += loss.item()
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((total, grads))
    for total, grads in found[1:]:
        assert total == pytest.approx(found[0][0], abs=1e-6)
        assert torch.allclose(grads, found[0][1], atol=1e-5)


def test_a_micro_batch_is_taken_apart_into_its_pairs(model):
    pairs = with_reference(model, make_pairs(3))
    for rows in LAYOUTS:
        for pair, again in zip(pairs, cut_pairs(PairCollator(rows)(pairs)), strict=True):
            assert again == {key: pair[key] for key in again} | {"reference": pytest.approx(pair["reference"], rel=1e-6)}


def plain_pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict:
    rows = [(prompt + answer, [IGNORED] * len(prompt) + answer) for answer in (chosen, rejected)]
    pair = {"input_ids": rows[0][0], "labels": rows[0][1], "rejected_ids": rows[1][0], "rejected_labels": rows[1][1]}
    return pair | {"shared_length": shared_length(pair)}


def test_a_prompt_stands_once_and_positions_go_on_from_it():
    pairs = [plain_pair([5, 6], [7], [8, 9]), plain_pair([1], [2, 3], [2])]
    batch = SharedPromptCollator(PAD, 64)(pairs)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 9, 9] and batch["cu_seq_lens_k"].tolist() == [0, 3, 7, 10, 12, 12]
    assert batch["key_index"].tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 5, 8]
    assert batch["target_positions"].tolist() == [1, 1, 3, 5, 6, 5] and batch["targets"].tolist() == [7, 8, 9, 2, 3, 2]
    assert batch["target_counts"] == [1, 2, 2, 1]


@pytest.mark.parametrize("pair", [
    pytest.param(plain_pair([5, 6, 7], [8, 9], [8, 10, 11]), id="answers that begin alike"),
    pytest.param(plain_pair([5], [6], [6, 7, 8]), id="one answer begins with the other"),
    pytest.param(plain_pair([], [6, 7, 8], [9, 7]), id="no prompt at all"),
    pytest.param(plain_pair([5, 6], [7], [8]) | {"rejected_ids": [5, 9, 8], "shared_length": 1}, id="prompts that differ"),
])  # fmt: skip
def test_a_pair_that_shares_its_prompt_is_what_it_is_alone(pair):
    model = make_model(moved=True)
    others = make_pairs(2)
    found = []
    for layout in (padded(PAD), SharedPromptCollator(PAD, 64), SharedPromptCollator(PAD, 64, (32, 64, 96), 4)):
        model.zero_grad()
        sums, counts = log_probs(model, PairCollator(layout)([others[0], pair, others[1]]))
        (sums * torch.tensor([0.3, -0.7])).sum().backward()
        found.append((sums.detach(), counts, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for some in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-5) for a, b in zip(some, found[0], strict=True))


def test_a_leak_from_one_answer_to_the_other_is_found_when_the_model_is_loaded(model, monkeypatch):
    """The same check that lets a model share prompts: with the tokens of the chosen answer among the rejected one's keys."""
    pairs, plan = make_pairs(3), Plan(backend="transformers", dtype="float32", padding_free=True)
    rows, shared = PaddingFreeCollator(PAD, 64), SharedPromptCollator(PAD, 64)
    assert _difference(model, plan, pairs, rows, shared) == ""
    make = SharedPromptCollator.__call__

    def leaking(self, pairs):
        batch = make(self, pairs)
        at = int(batch["cu_seq_lens_k"][1])  # where the prompt's keys begin for the rejected answer
        batch["key_index"][at] = int(batch["cu_seq_lens_q"][1]) - 1  # the last token of the chosen one
        return batch

    monkeypatch.setattr(SharedPromptCollator, "__call__", leaking)
    assert "would not be what it is alone" in _difference(model, plan, pairs, rows, shared)


def test_a_sliding_window_counts_from_the_end_of_the_keys():
    """Attention over shared prompts with a window, against rows of their own."""
    torch.manual_seed(0)
    pair = plain_pair([5, 6, 7, 8, 9], [1, 2], [3, 4, 5, 6])
    batch = SharedPromptCollator(PAD, 64)([pair])
    tokens = batch["input_ids"].shape[1]
    query, key, value = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    shared, _ = attend(None, query, key, value, None, sliding_window=3, **batch)
    places = [*range(5), *range(7, 11)]  # the prompt and the rejected answer
    ends = {"cu_seq_lens_q": torch.tensor([0, 9]), "max_length_q": 64}
    alone, _ = attend(None, *(x[:, :, places] for x in (query, key, value)), None, sliding_window=3, **ends)
    assert torch.allclose(shared[:, 7:], alone[:, 5:], atol=1e-6)


@pytest.mark.parametrize(
    ("began", "now", "margin", "told"),
    [
        (-100, -125, 0.1, True),
        (-100, -115, 0.1, False),
        (-20, -28, 0.1, False),
        (-20, -31, 0.1, True),
        (-100, -125, -0.1, False),
        (-100, -50, 0.1, False),
    ],
)
def test_chosen_answers_fell_far_by_a_fifth_and_ten_nats_while_the_margin_grew(began, now, margin, told):
    assert fell_far(now, 0.3 * (now - began), margin, 0.3) == told


# -------------------------------------------------------------------------------------------------------- the data


@pytest.fixture
def tokens(tmp_path, monkeypatch, loaded_tokenizer):
    """`tokens(rows, *overrides)`: these pairs prepared."""

    def prepared(rows, *overrides):
        monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        fixed = ("method=dpo", "dataset=local", f"dataset.path={path}", "dataset.eval_fraction=0", "dataset.shuffle=false")
        settings: Settings = make_settings(*fixed, *overrides)
        return prepare(settings, *loaded_tokenizer)

    return prepared


EXPLICIT = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
TURNS = {"prompt": [user("Hi?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
WHOLE = {"chosen": [user("Hi?"), assistant("Yes.")], "rejected": [user("Hi?"), assistant("No.")]}
TASK = {"instruction": "Hi?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize("row", [EXPLICIT, TURNS, WHOLE, TASK, WHOLE | {"prompt": "Hi?", "score_chosen": 8.0}])
def test_a_pair_in_any_form_is_its_prompt_with_each_answer(tokens, tokenizer, row):
    (pair,) = tokens([row]).train
    for ids, labels, answer in (
        (pair["input_ids"], pair["labels"], "Yes."),
        (pair["rejected_ids"], pair["rejected_labels"], "No."),
    ):
        whole = tokenizer.apply_chat_template([user("Hi?"), assistant(answer)], tokenize=False).removesuffix("\n")
        assert tokenizer.decode(ids) == whole
        assert tokenizer.decode([label for label in labels if label != IGNORED]) == f"{answer}<|im_end|>"


def test_equal_pairs_are_left_out_and_length_is_told(tokens):
    longer = [{"prompt": f"q{n}", "chosen": "a b c d e f", "rejected": "a"} for n in range(4)]
    found = tokens([*longer, {"prompt": "q", "chosen": "a", "rejected": "a"}])
    counts = {"pairs": 4, "equal_pairs": 1, "chosen_longer": 4, "contradicting": 0, "held_out_prompts": 0}
    assert found.facts["pairs"] == counts and len(found.train) == 4
    assert any("two equal answers" in text for text in found.facts["warnings"])
    assert any("In 100% of the pairs the chosen answer is the longer one" in text for text in found.facts["warnings"])


def test_pairs_that_a_cut_makes_equal_are_left_out(tokens):
    rows = [EXPLICIT, {"prompt": "q", "chosen": "word " * 80 + "a", "rejected": "word " * 80 + "b"}]
    found = tokens(rows, "model.max_seq_length=64", "dataset.overlong=truncate")
    assert [pair["row"] for pair in found.train] == [1] and found.facts["pairs"]["equal_pairs"] == 1


def test_pairs_that_contradict_each_other_are_told_with_their_rows(tokens):
    opposed = {"prompt": "Hi?", "chosen": "No.", "rejected": "Yes."}
    found = tokens([EXPLICIT, EXPLICIT | {"prompt": "Well?"}, opposed, opposed | {"prompt": "Other?"}])
    assert found.facts["pairs"]["contradicting"] == 2
    assert [text for text in found.facts["warnings"] if "(row 1 and row 3)" in text and text.startswith("2 pairs contradict")]


def test_held_out_prompts_that_are_trained_on_are_told_with_their_rows(tokens, tmp_path):
    held_out = [{"prompt": "New?", "chosen": "Yes.", "rejected": "No."}, EXPLICIT | {"chosen": "Sure."}]
    (tmp_path / "held_out.json").write_text(json.dumps(held_out), encoding="utf-8")
    rows = [EXPLICIT | {"prompt": "Well?"}, EXPLICIT]
    found = tokens(rows, f"dataset.eval_path={tmp_path / 'held_out.json'}")
    assert (found.facts["pairs"]["held_out_prompts"], found.facts["pairs"]["contradicting"]) == (1, 0)
    assert any("1 held-out pairs have a prompt" in w and "(row 2 has that of row 2)" in w for w in found.facts["warnings"])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "chosen": "a"}, "has no column 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "has no column for the prompt"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "hint: dataset.columns.prompt=question"),
        (WHOLE | {"rejected": [user("Other?"), assistant("No.")]}, "begin differently"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(tokens, row, words):
    with pytest.raises(Refusal) as refusal:
        tokens([row, row])
    assert words in str(refusal.value)


def test_a_pair_is_as_long_as_its_longer_answer(tokens):
    rows = [EXPLICIT | {"rejected": "word " * 80}, EXPLICIT]
    with pytest.raises(Refusal, match="1 of 2 train rows"):
        tokens(rows, "model.max_seq_length=64")
    found = tokens(rows, "model.max_seq_length=64", "dataset.overlong=drop")
    assert [pair["row"] for pair in found.train] == [2]
