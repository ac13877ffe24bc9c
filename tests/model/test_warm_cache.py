"""What jobs of one process share comes back as it was, or is loaded again."""

import gc
import hashlib
import json
import weakref

import pytest
import torch

from sft import environment
from sft.lifecycle import run
from sft.model import adapters, loading, warm_cache
from sft.plan.plan import Plan, plan_saved
from sft.training.trainer import ResumableTrainer
from tests.conftest import SMALL, make_settings


@pytest.fixture
def keeping():
    environment.prepare_environment()
    warm_cache.keep(True)
    before = dict(warm_cache.loads)
    yield lambda: {name: count - before[name] for name, count in warm_cache.loads.items()}
    warm_cache.keep(False)


def counts(found) -> tuple[int, ...]:
    return found["model"], found["tokenizer"], found["tokens"]


def weights(model) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()


def names(model) -> list[str]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return [f"{name} {type(module).__name__}" for name, module in model.named_modules()] + [f"{hooks} hooks"]


def attached(settings):
    return warm_cache.attach_adapter(warm_cache.load_model(settings, plan_saved(settings))[0], settings, plan_saved(settings))


def train_a_step(settings):
    model = attached(settings)
    model.enable_input_require_grads()
    model.base_model.model.model.layers[0].forward = model.base_model.model.model.layers[0].forward  # as a patch would
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    ids = torch.arange(12).reshape(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.rand(3)


def test_each_job_trains_with_all_modules_in_training_mode(keeping, tmp_path, monkeypatch):
    """Else a later job, whose first evaluation is the one before's, captures and recomputes no layers until its own."""
    modes, step = [], ResumableTrainer.training_step

    def training_step(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        modes.append({module.training for module in self.model.modules()})
        return found

    monkeypatch.setattr(ResumableTrainer, "training_step", training_step)
    for seed in (1, 2, 3):
        job = make_settings(*SMALL, "trainer=debug", "trainer.max_steps=2", "dataset.seed=0", f"seed={seed}")
        assert run(job, tmp_path / f"{seed}").status == "finished"
        warm_cache.release()
    assert keeping()["evaluation"] == 1 and modes == [{True}] * 6


def test_a_shared_model_comes_back_as_it_was_loaded(keeping):
    settings = make_settings(*SMALL, "lora.r=8")
    fresh, _ = warm_cache.load_model(settings, plan_saved(settings))
    weights_before, names_before, cache = weights(fresh), names(fresh), fresh.config.use_cache
    for rank in (8, 4):
        train_a_step(make_settings(*SMALL, f"lora.r={rank}"))
        warm_cache.release()
    again, _ = warm_cache.load_model(settings, plan_saved(settings))
    assert again is fresh and keeping()["model"] == 1
    assert weights(again) == weights_before and names(again) == names_before and again.config.use_cache == cache
    assert all(p.requires_grad and p.grad is None for p in again.parameters()) and not hasattr(again, "peft_config")
    assert "forward" not in again.model.layers[0].__dict__


def test_a_model_that_was_written_to_is_loaded_again(keeping):
    settings = make_settings(*SMALL)
    fresh, _ = warm_cache.load_model(settings, plan_saved(settings))
    before = weights(fresh)
    with torch.no_grad():
        fresh.model.layers[0].self_attn.q_proj.weight.add_(1e-3)
    again, _ = warm_cache.load_model(settings, plan_saved(settings))
    assert again is not fresh and weights(again) == before and keeping()["model"] == 2


@pytest.mark.parametrize("other", ["lora=none", "model.max_seq_length=64", "model.dtype=bfloat16"])
def test_other_settings_get_a_model_of_their_own(keeping, other):
    first, _ = warm_cache.load_model(make_settings(*SMALL), Plan())
    second, _ = warm_cache.load_model(make_settings(*SMALL, other), Plan())
    assert second is not first and keeping()["model"] == 2


def test_rows_are_tokenised_once_for_jobs_that_agree_on_them(keeping):
    for words in (["lora.r=8"], ["lora.r=4"], ["trainer.learning_rate=1e-3"]):
        settings = make_settings(*SMALL, *words)
        tokenizer, stop_ids = warm_cache.load_tokenizer(settings)
        warm_cache.prepare_data(settings, tokenizer, stop_ids)
    assert counts(keeping()) == (0, 1, 1)
    other = make_settings(*SMALL, "seed=1")
    warm_cache.prepare_data(other, *warm_cache.load_tokenizer(other))
    assert counts(keeping()) == (0, 1, 2), "the seed chooses the rows"


def test_an_adapter_comes_back_as_it_was_before_it_was_trained(keeping):
    """Weights, names, flags and the random state are those of one that is made anew."""
    settings = make_settings(*SMALL, "lora.r=8", "lora.lora_dropout=0.1")
    fresh = adapters.attach(loading.load_model(settings, plan_saved(settings))[0], settings, plan_saved(settings))
    expected = weights(fresh), names(fresh), [p.requires_grad for p in fresh.parameters()], torch.rand(3).tolist()
    for _ in range(2):
        train_a_step(settings)
        warm_cache.release()
    again = attached(settings)
    found = weights(again), names(again), [p.requires_grad for p in again.parameters()], torch.rand(3).tolist()
    assert found == expected and all(p.grad is None for p in again.parameters())
    assert (keeping()["model"], keeping()["adapter"]) == (1, 1)


@pytest.mark.parametrize("other", ["lora.r=4", "lora.lora_alpha=3", "seed=1"])
def test_another_adapter_is_made_anew(keeping, other):
    train_a_step(make_settings(*SMALL, "lora.r=8"))
    warm_cache.release()
    settings = make_settings(*SMALL, "lora.r=8", other)
    again = weights(attached(settings))
    assert again == weights(
        adapters.attach(loading.load_model(settings, plan_saved(settings))[0], settings, plan_saved(settings))
    )
    assert (keeping()["model"], keeping()["adapter"]) == (1, 2)


def test_an_adapter_beside_a_weight_that_was_written_to_is_made_anew(keeping):
    settings = make_settings(*SMALL, "lora.r=8")
    model = attached(settings)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.add_(1e-3)
    warm_cache.release()
    expected = weights(adapters.attach(loading.load_model(settings, plan_saved(settings))[0], settings, plan_saved(settings)))
    assert weights(attached(settings)) == expected and (keeping()["model"], keeping()["adapter"]) == (2, 2)


def test_an_adapter_whose_weight_lies_elsewhere_is_made_anew(keeping):
    settings = make_settings(*SMALL, "lora.r=8")
    weight = next(p for p in attached(settings).parameters() if p.requires_grad)
    weight.data = weight.data.clone()
    warm_cache.release()
    again = attached(settings)
    fresh = adapters.attach(loading.load_model(settings, plan_saved(settings))[0], settings, plan_saved(settings))
    assert weights(again) == weights(fresh) and names(again) == names(fresh)
    assert (keeping()["model"], keeping()["adapter"]) == (1, 2)


class Passes:
    """In place of sft.model.cuda_graphs.GraphPool, which needs a GPU."""

    lengths = (64,)

    def forget(self):
        self.lengths = ()


def test_recorded_passes_stay_with_their_adapter(keeping):
    settings = make_settings(*SMALL, "lora.r=8")
    made = []
    for _ in range(2):
        made.append(warm_cache.captured_steps(attached(settings), settings, [(64,), 2], Passes))
        warm_cache.release()
    model = attached(settings)
    made.append(warm_cache.captured_steps(model, settings, [(128,), 2], Passes))
    assert made[0] is made[1] is not made[2]
    assert made[0].lengths == ()
    made[2].forget()  # as where the memory ran out
    assert warm_cache.captured_steps(model, settings, [(128,), 2], Passes) is not made[2]
    other = make_settings(*SMALL, "lora.r=4")
    assert warm_cache.captured_steps(attached(other), other, [(64,), 2], Passes) not in made
    exporting = make_settings(*SMALL, "lora.r=4", "export=adapter")
    kept = warm_cache.captured_steps(attached(other), other, [(64,), 2], Passes)
    made_for_once = warm_cache.captured_steps(attached(exporting), exporting, [(64,), 2], Passes)
    assert made_for_once is not kept and kept.lengths == () and "captured_steps" not in warm_cache._kept
    assert not warm_cache.keeps_captured_steps(exporting) and warm_cache.keeps_captured_steps(other)


def test_an_adapter_that_another_one_replaces_is_gone_without_the_garbage_collector(keeping):
    settings = make_settings(*SMALL, "lora.r=8")
    train_a_step(settings)
    weights = [weakref.ref(p) for p in attached(settings).parameters() if p.requires_grad]
    warm_cache.release()
    gc.disable()
    try:
        attached(make_settings(*SMALL, "lora.r=4"))
        assert weights and not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_what_is_left_after_a_run_is_not_looked_through_again(keeping, monkeypatch):
    monkeypatch.setattr(warm_cache, "_frozen", False)
    gc.freeze()  # as Python 3.12 does with what it begins with
    frozen, kept = gc.get_freeze_count(), [[] for _ in range(1000)]
    warm_cache.release()
    assert gc.get_freeze_count() >= frozen + len(kept)
    warm_cache.thaw()
    assert gc.get_freeze_count() >= frozen + len(kept), "a run in a sweep leaves it so"
    warm_cache.keep(False)
    assert gc.get_freeze_count() == 0
    warm_cache.freeze()
    assert gc.get_freeze_count() > len(kept)
    warm_cache.thaw()
    assert gc.get_freeze_count() == 0


def test_what_the_model_says_before_it_learns_is_taken_once_for_all_ranks(keeping, tmp_path):
    from sft.lifecycle import run

    base = (*SMALL, "trainer.max_steps=2", "trainer.learning_rate=1e-2", "samples.max_new_tokens=6", "tracking=none")
    jobs = {"r4": "lora.r=4", "r8": "lora.r=8", "dora": "lora.use_dora=true", "limited": "trainer.max_hours=1",
            "longer": "samples.max_new_tokens=7"}  # fmt: skip

    def train(name, place):
        assert run(make_settings(*base, jobs[name]), tmp_path / place / name).status == "finished"
        warm_cache.release()

    def told(name, place):
        lines = [json.loads(line) for line in (tmp_path / place / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        measured = ("tokens_per_second", "memory_gib")
        curve = [{key: value for key, value in line.items() if key not in measured} for line in lines]
        return curve, (tmp_path / place / name / "samples.jsonl").read_text(encoding="utf-8")

    for name, expected in (("r4", (1, 1)), ("r8", (1, 1)), ("dora", (1, 1)), ("limited", (1, 1)), ("longer", (1, 2))):
        train(name, "together")
        assert (keeping()["evaluation"], keeping()["completions"]) == expected, name
    assert keeping()["model"] == 1
    warm_cache.keep(False)
    for name in jobs:
        train(name, "alone")
        assert told(name, "together") == told(name, "alone"), name
    curve, answers = told("r8", "alone")
    assert any(line["step"] == 0 and "eval_loss" in line for line in curve) and '"step": 0' in answers
