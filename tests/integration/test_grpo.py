"""Runs of method=grpo: they raise their reward, go on bit for bit after a cut anywhere, and compute what TRL's trainer does."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from sft.errors import Refusal
from sft.generation.decoding import Decoder
from sft.launch.ranks import launch
from sft.lifecycle import run
from sft.methods import grpo, rollouts
from sft.runs.record import Context
from sft.signals import StopRequest
from tests.conftest import make_settings
from tests.faults.fault_campaign import MEASURED, compare

ROWS = [{"instruction": f"Say {n}.", "answer": f"{n}"} for n in range(20)]

REWARD = '''
def letters(completion, row):
    """Between 0 and 1, and hardly ever the same for two completions."""
    return sum(map(ord, completion)) % 17 / 17


def halves(completion, row):
    return float(sum(map(ord, completion)) % 2)


def none(completion, row):
    return 0.0
'''


@pytest.fixture
def settings(tmp_path):
    path, rewards = tmp_path / "rows.json", tmp_path / "rewards.py"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    rewards.write_text(REWARD, encoding="utf-8")
    fixed = ("method=grpo", "dataset=local", f"dataset.path={path}", "dataset.eval_fraction=0.2", "model=tiny_random",
             f"method.reward_funcs=[{rewards}:letters]", "method.reward_weights=[1]", "method.max_completion_length=6",
             "method.num_generations=4", "tracking=none", "trainer.max_steps=6", "trainer.learning_rate=1e-2",
             "trainer.effective_batch_size=4", "trainer.per_device_train_batch_size=2", "trainer.eval_steps=3",
             "trainer.save_steps=2", "samples.num_held_out=1", "samples.max_new_tokens=4")  # fmt: skip
    return lambda *more: make_settings(*fixed, *(word.replace("{rewards}", str(rewards)) for word in more))


def lines(folder, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_logs_its_rollouts_and_evaluates_to_the_reward_of_greedy_completions(settings, tmp_path):
    result = run(settings(), tmp_path / "run")
    assert (result.status, result.exit_code) == ("finished", 0)
    found, rolled = lines(tmp_path / "run"), lines(tmp_path / "run", "rollouts.jsonl")
    trained = [line for line in found if "loss" in line]
    assert len(trained) == 6 and len(rolled) == 6 * 4
    for line in trained:
        mine = [one for group in rolled if group["step"] == line["step"] for one in group["completions"]]
        assert len(mine) == 16
        assert line["reward"] == pytest.approx(sum(one["reward"] for one in mine) / 16, abs=1e-5)
        assert line["reward/letters"] == line["reward"] and line["length"] == sum(one["tokens"] for one in mine) / 16
        assert line["entropy"] > 0 and line["sampler_gap"] < 1e-4 and line["loss"] == pytest.approx(0, abs=1)
        assert "kl" not in line and "clipped" not in line
    evaluated = [line for line in found if "eval_reward" in line]
    assert [line["step"] for line in evaluated] == [0, 3, 6] and "eval_loss" not in evaluated[0]
    assert {"eval_reward/letters", "eval_ended", "eval_length"} <= evaluated[0].keys()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    best = max(evaluated[1:], key=lambda line: line["eval_reward"])
    assert record["metrics"]["best_step"] == best["step"]
    assert (
        record["metrics"]["eval_reward"]
        == pytest.approx(best["eval_reward"], abs=1e-6)
        == pytest.approx(result.metric, abs=1e-6)
    )
    assert record["seconds"]["rollouts"] > 0
    of_rows = lines(tmp_path / "run", "eval_rows.jsonl")
    assert [line["step"] for line in of_rows] == [0, 3, 6]
    for line, mean in zip(of_rows, evaluated, strict=True):
        assert len(line["rewards"]) == 4 and sum(line["rewards"]) / 4 == pytest.approx(mean["eval_reward"], abs=1e-5)
    kept = lines(tmp_path / "run", "held_out.jsonl")
    assert len(kept) == 4 and all(
        row["input_ids"][row["prompt_length"] :] == [x for x in row["labels"] if x >= 0] for row in kept
    )


# ------------------------------------------------------------------------------------------------- TRL


class Recorded:
    """What a run drew and computed, to be replayed."""

    def __init__(self, monkeypatch):
        self.start, self.prompts, self.completions, self.rewards, self.losses = None, [], [], [], []
        build, settle = grpo.build_trainer, rollouts.Rollout.settle

        def build_trainer(ctx, model, loop):
            self.start = {name: weight.clone() for name, weight in get_peft_model_state_dict(model).items()}
            trainer = build(ctx, model, loop)
            self.tokenizer = ctx.tokenizer
            usual = type(trainer).compute_loss
            monkeypatch.setattr(type(trainer), "compute_loss", lambda *args, **kwargs: self.note(usual(*args, **kwargs)))
            return trainer

        def settled(rollout, step, entries):
            before = rollout.number
            settle(rollout, step, entries)
            self.losses.append(0.0)
            if rollout.number != before:
                self.prompts.append([group.prompt_ids for group in rollout.groups])
                self.completions.append([[one.ids for one in group.completions] for group in rollout.groups])
                self.rewards.append([one.reward for group in rollout.groups for one in group.completions])

        monkeypatch.setattr(grpo, "build_trainer", build_trainer)
        monkeypatch.setattr(rollouts.Rollout, "settle", settled)

    def note(self, loss):
        self.losses[-1] += loss.item()
        return loss


def end_every_second(monkeypatch):
    """A model of chance hardly ever ends: have every second completion end after three tokens."""

    def complete(self, prompts, check_stop, keys, copies, usual=rollouts.Generator._complete):
        found = usual(self, prompts, check_stop, keys, copies)
        for some in found:
            for one in some[::2]:
                one.ids[3:], one.log_probs[4:], one.ended = [self.tokenizer.eos_token_id], [], True
        return found

    monkeypatch.setattr(rollouts.Generator, "_complete", complete)


def replay(recorded: Recorded, settings, folder):
    """(losses, gradient norms) of TRL's GRPOTrainer from the same adapter by the same completions and rewards."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from sft.model import builtin

    method, t, lora = settings.method, settings.trainer, settings.lora
    base = AutoModelForCausalLM.from_pretrained(builtin.local_model(builtin.TINY_RANDOM), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules,
                                            task_type="CAUSAL_LM"))  # fmt: skip
    set_peft_model_state_dict(model, recorded.start)
    turn, losses = [0], []

    class Replay(GRPOTrainer):
        def _generate(self, prompts):
            at, turn[0] = turn[0], turn[0] + 1
            said = [ids for some in recorded.completions[at] for ids in some]
            asked = [prompt for prompt in recorded.prompts[at] for _ in range(method.num_generations)]
            return asked, said, None, ["" for _ in said], None, {}, None, None

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    count = len(recorded.completions[0]) * method.num_generations
    args = GRPOConfig(
        str(folder), per_device_train_batch_size=count, gradient_accumulation_steps=1, num_generations=method.num_generations,
        max_completion_length=method.max_completion_length, max_steps=t.max_steps, learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type, warmup_steps=t.warmup_steps, weight_decay=t.weight_decay, beta=method.beta,
        max_grad_norm=t.max_grad_norm, loss_type=method.loss_type.value, scale_rewards=method.scale_rewards.value,
        epsilon=method.epsilon, epsilon_high=method.epsilon_high, num_iterations=method.num_iterations,
        temperature=method.temperature, mask_truncated_completions=method.mask_truncated_completions, logging_steps=1,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    trainer = Replay(model, reward_funcs=lambda completions, **_: recorded.rewards[turn[0] - 1], args=args,
                     train_dataset=Dataset.from_list([{"prompt": "a"}] * 64), processing_class=recorded.tokenizer)  # fmt: skip
    trainer.train()
    return losses, [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]


@pytest.mark.parametrize("more", [
    ("method.loss_type=dapo", "trainer.per_device_train_batch_size=1"),
    ("method.loss_type=grpo", "method.num_iterations=2", "method.epsilon=0.02", "method.epsilon_high=0.05"),
    ("method.loss_type=dr_grpo", "method.temperature=0.7", "method.reward_funcs=[{rewards}:halves]"),
    ("method.loss_type=bnpo", "method.scale_rewards=batch", "method.mask_truncated_completions=true"),
    ("method.loss_type=dapo", "method.beta=0.2", "trainer.padding_free=false", "trainer.learning_rate=1e-3"),
])  # fmt: skip
def test_losses_and_gradients_are_those_of_trls_trainer_over_ten_updates(settings, tmp_path, monkeypatch, more):
    recorded = Recorded(monkeypatch)
    if "method.mask_truncated_completions=true" in more:
        end_every_second(monkeypatch)
    chosen = settings(
        "trainer.max_steps=10", "trainer.eval_steps=100", "trainer.save_steps=100", "trainer.warmup_steps=2", *more
    )
    assert run(chosen, tmp_path / "ours").status == "finished"
    losses, norms = replay(recorded, chosen, tmp_path / "theirs")
    ours = [line["grad_norm"] for line in lines(tmp_path / "ours") if "grad_norm" in line]
    assert len(losses) == len(recorded.losses) == chosen.trainer.max_steps
    assert recorded.losses == pytest.approx(losses, abs=1e-5)
    assert ours == pytest.approx(norms, abs=1e-5, rel=1e-4) and sum(ours) > 0
    if chosen.method.num_iterations > 1:
        clipped = [line["clipped"] for line in lines(tmp_path / "ours") if "clipped" in line]
        assert clipped[0::2] == [0.0] * 5 and max(clipped) > 0 and any(abs(loss) > 1e-6 for loss in losses)


# ------------------------------------------------------------------------------------------------- going on


SHAPES = [
    (),
    ("trainer.logging_steps=4", "method.num_iterations=2", "method.beta=0.1", "trainer.save_steps=1"),
    ("lora=none", "trainer.learning_rate=1e-3"),
    ("trainer.padding_free=false", "trainer.max_steps=-1", "trainer.num_train_epochs=2"),
]


@pytest.mark.parametrize("more", SHAPES)
def test_two_runs_are_equal_and_one_that_was_stopped_goes_on_as_if_it_never_was(settings, tmp_path, monkeypatch, more):
    """Also between two updates of one rollout."""
    chosen = settings(*more)
    assert run(chosen, tmp_path / "whole").status == "finished"
    assert run(chosen, tmp_path / "again").status == "finished"
    assert compare(tmp_path / "whole", tmp_path / "again") == []
    step = 3 if "method.num_iterations=2" in more else 2

    def stop(self):
        self.signal = self.signal or ("SIGTERM" if (tmp_path / "cut" / "checkpoints" / f"checkpoint-{step}").exists() else None)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agree", stop)
        assert run(chosen, tmp_path / "cut").status == "stopped"
    assert lines(tmp_path / "cut", "rollouts.jsonl")[-1]["step"] in (step, step + 1)
    assert run(chosen, tmp_path / "cut").status == "finished"
    assert compare(tmp_path / "whole", tmp_path / "cut") == []


@pytest.mark.parametrize("at", [0, 3])
def test_a_stop_inside_a_rollout_throws_it_away_and_it_is_made_again(settings, tmp_path, monkeypatch, at):
    chosen = settings("trainer.save_steps=100", "trainer.eval_steps=100")
    assert run(chosen, tmp_path / "whole").status == "finished"
    steps, rollouts_begun = [], []

    def settle(self, step, entries, usual=rollouts.Rollout.settle):
        rollouts_begun.append(step)
        usual(self, step, entries)

    def interrupt(self, rows, places, usual=Decoder._step):
        steps.append(rows)
        if rollouts_begun and rollouts_begun[-1] == at and self.rows == 16:
            self.stop.signal = "SIGTERM"
        usual(self, rows, places)

    def complete(self, prompts, check_stop, keys=None, usual=rollouts.Generator.complete):
        Decoder.stop = check_stop.__self__
        return usual(self, prompts, check_stop, keys)

    with monkeypatch.context() as patch:
        patch.setattr(rollouts.Rollout, "settle", settle)
        patch.setattr(Decoder, "_step", interrupt)
        patch.setattr(rollouts.Generator, "complete", complete)
        result = run(chosen, tmp_path / "cut")
    assert (result.status, result.exit_code) == ("stopped", 130)
    assert not (tmp_path / "cut" / "rollouts.jsonl").exists() or lines(tmp_path / "cut", "rollouts.jsonl")[-1]["step"] == at
    assert run(chosen, tmp_path / "cut").status == "finished"
    assert compare(tmp_path / "whole", tmp_path / "cut") == []


def test_two_processes_are_the_run_of_one_and_go_on_from_each_other(settings, tmp_path, forked_children):
    """16 prompts in steps of 6, so that shares have to be filled up; a rollout is good for two updates."""
    more = ("trainer.gradient_accumulation_steps=null", "trainer.effective_batch_size=6", "trainer.max_steps=8",
            "trainer.per_device_train_batch_size=3", "trainer.learning_rate=1e-3", "trainer.logging_steps=3",
            "method.num_iterations=2", "method.beta=0.1", "trainer.save_steps=1", "trainer.save_total_limit=10")  # fmt: skip
    chosen, two = settings(*more), settings(*more, "distributed.num_processes=2")
    assert run(chosen, tmp_path / "one").status == "finished"
    assert launch(two, tmp_path / "two", Context()).status == "finished"
    assert near(tmp_path / "one", tmp_path / "two")
    for name in ("one", "two"):  # as if killed between the two updates of a rollout
        shutil.copytree(tmp_path / name, tmp_path / f"from {name}")
        for step in (6, 7, 8):
            shutil.rmtree(tmp_path / f"from {name}" / "checkpoints" / f"checkpoint-{step}")
        place = tmp_path / f"from {name}" / "run.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"status": "running"}))
    assert launch(two, tmp_path / "from two", Context()).status == "finished"
    assert near(tmp_path / "one", tmp_path / "from two")


def near(one, other) -> bool:
    """Whether two runs are one but for the order of sums in float32."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        ours, theirs = ([flat(line) for line in lines(folder, name)] for folder in (one, other))
        key = lambda line: (line["step"], line.get("row", 0))  # noqa: E731  (a step's prompts are in the order of processes)
        for a, b in zip(sorted(ours, key=key), sorted(theirs, key=key), strict=True):
            assert a.keys() == b.keys()
            assert b == {k: pytest.approx(v, rel=1e-3, abs=1e-4) if isinstance(v, float) else v for k, v in a.items()}
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other)]
    return max(float(abs(weights[0][name] - weights[1][name]).max()) for name in weights[0]) < 1e-5


def flat(line: dict) -> dict:
    """A line with the numbers of its completions beside it, and without what the clock says."""
    more = {f"{name} {i}": value for i, one in enumerate(line.get("completions", ())) for name, value in one.items()}
    return {k: v for k, v in (line | more).items() if k not in (*MEASURED, "completions") and not k.startswith("rewards")}


# ------------------------------------------------------------------------------------------------- what ends a run


def test_a_first_rollout_with_nothing_to_learn_from_is_refused_before_anything_is_trained(settings, tmp_path):
    with pytest.raises(Refusal) as refused:
        run(settings("method.reward_funcs=[{rewards}:none]"), tmp_path / "run")
    (problem,) = refused.value.problems
    assert problem.what == "method.max_completion_length=6" and "cut at 6 tokens" in problem.why
    assert "method.max_completion_length=24" in problem.fix
    assert not (tmp_path / "run" / "run.json").exists() and not [*(tmp_path / "run" / "checkpoints").iterdir()]


def test_the_hint_of_that_refusal_is_typed(settings, tmp_path):
    (tmp_path / "long.py").write_text(
        "def reward(completion, row):\n    return sum(map(ord, completion)) % 9 if row['tokens'] > 9 else 0\n"
    )
    more = (f"method.reward_funcs=[{tmp_path / 'long.py'}:reward]", "trainer.max_steps=1")
    with pytest.raises(Refusal) as refused:
        run(settings(*more), tmp_path / "run")
    hint = refused.value.problems[0].fix.splitlines()[0]
    assert run(settings(*more, hint), tmp_path / "run").status == "finished"


def test_a_run_that_learns_nothing_any_more_ends_as_failed(settings, tmp_path, monkeypatch):
    def settle(self, step, entries, usual=rollouts.Rollout.settle):
        if step == 1:
            self.rewards[0].function.__globals__["flat"] = True
        usual(self, step, entries)

    monkeypatch.setattr(rollouts.Rollout, "settle", settle)
    source = "flat = False\n\n\ndef until(completion, row):\n    return 0.5 if flat else sum(map(ord, completion)) % 5 / 5\n"
    (tmp_path / "until.py").write_text(source)
    more = (f"method.reward_funcs=[{tmp_path / 'until.py'}:until]", "method.max_idle_steps=3", "trainer.max_steps=12")
    result = run(settings(*more), tmp_path / "run")
    assert (result.status, result.exit_code) == ("failed", 1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "in 3 steps in a row" in record["reason"] and record["metrics"]["steps"] == 4
    assert (tmp_path / "run" / "adapter").is_dir(), "what was learnt before is kept"


@pytest.mark.parametrize(("body", "told"), [
    ("    raise ValueError('no')", "raised ValueError: no"),
    ("    return next(reward.__dict__.setdefault('n', iter(range(10**6)))) / 1e6", "and then"),
])  # fmt: skip
def test_a_reward_that_fails_ends_the_run_and_is_never_a_zero(settings, tmp_path, body, told):
    """The data's own answers show nothing of it: those end."""
    (tmp_path / "bad.py").write_text(
        f"def reward(completion, row):\n    if row['finish'] == 'ended':\n        return 0.5\n{body}\n"
    )
    result = run(settings(f"method.reward_funcs=[{tmp_path / 'bad.py'}:reward]"), tmp_path / "run")
    assert (result.status, result.exit_code) == ("failed", 1)
    assert told in json.loads((tmp_path / "run" / "run.json").read_text())["reason"]


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_model_that_draws_by_other_numbers_than_it_trains_is_told_once(settings, tmp_path, monkeypatch, caplog, shift):
    def complete(self, *args, usual=rollouts.Generator._complete):
        found = usual(self, *args)
        for one in (one for some in found for one in some):
            one.log_probs = [value - shift for value in one.log_probs]
        return found

    monkeypatch.setattr(rollouts.Generator, "_complete", complete)
    assert run(settings("trainer.max_steps=3"), tmp_path / "run").status == "finished"
    told = [record for record in caplog.records if "nats from those in the training" in record.getMessage()]
    assert len(told) == (1 if shift else 0)


def test_rollouts_that_do_not_fit_are_made_in_halves_and_are_the_same(settings, tmp_path, monkeypatch, caplog):
    chosen = settings("trainer.max_steps=2")
    assert run(chosen, tmp_path / "whole").status == "finished"

    def limited(self, model, rows, places, trained=False, usual=Decoder.__init__):
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        usual(self, model, rows, places, trained)

    monkeypatch.setattr(Decoder, "__init__", limited)
    assert run(chosen, tmp_path / "halved").status == "finished"
    assert "16 completions at once do not fit into the memory; from now on 8." in caplog.text
    texts = [[[one["text"] for one in line["completions"]] for line in lines(tmp_path / name, "rollouts.jsonl")]
             for name in ("whole", "halved")]  # fmt: skip
    assert texts[0] == texts[1]


def test_the_rows_of_a_step_that_is_not_finite_are_named(settings, tmp_path, monkeypatch, caplog):
    usual, calls = grpo.token_losses, []

    def spoiled(*args):
        calls.append(1)
        losses, clipped = usual(*args)
        return (losses * float("nan") if len(calls) in (3, 4) else losses), clipped  # both micro-batches of the second step

    monkeypatch.setattr(grpo, "token_losses", spoiled)
    assert run(settings(), tmp_path / "run").status == "finished"
    rows = [line["row"] for line in lines(tmp_path / "run", "rollouts.jsonl") if line["step"] == 2]
    (text,) = [record.getMessage() for record in caplog.records if "not a finite number; it was skipped" in record.getMessage()]
    assert sorted(text.partition("Its rows: ")[2].split(", ")) == sorted(f"row {row}" for row in rows)


def test_a_micro_batch_that_does_not_fit_is_cut_and_the_step_is_the_same(settings, tmp_path, monkeypatch):
    chosen = settings("trainer.max_steps=2", "trainer.per_device_train_batch_size=4")
    assert run(chosen, tmp_path / "whole").status == "finished"
    usual = grpo.token_log_probs

    def limited(model, inputs, temperature):
        if len(inputs["targets"]) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(model, inputs, temperature)

    monkeypatch.setattr(grpo, "token_log_probs", limited)
    counted, log_line = [], grpo.build_trainer

    def build_trainer(*args):
        trainer = log_line(*args)
        usual = trainer.take_line
        trainer.take_line = lambda *args, **kwargs: counted.append(float(trainer.sums[0])) or usual(*args, **kwargs)
        return trainer

    monkeypatch.setattr(grpo, "build_trainer", build_trainer)
    assert run(chosen, tmp_path / "cut").status == "finished"
    ours, theirs = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("whole", "cut"))
    assert counted == [16 * line["length"] for line in theirs], "a token counts once"
    for a, b in zip(ours, theirs, strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), abs=1e-5)
        assert b["sampler_gap"] < 1e-4 and b["rows_at_once"] < 16
