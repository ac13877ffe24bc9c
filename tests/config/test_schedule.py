"""How often a run measures the held-out loss and answers prompts, where the settings leave it open."""

import pytest

from sft.config.schedule import evaluation_work, steps_between, with_eval_schedule

FACTS = {"rows": {"train": 900, "eval": 100}, "train_tokens": 180_000, "eval_tokens": 20_000}
MANY = {"rows": {"train": 9_800, "eval": 200}, "train_tokens": 1_960_000, "eval_tokens": 40_000}


def looks_of(settings, facts=FACTS):
    planned = with_eval_schedule(settings, facts)
    return planned.trainer.eval_steps, planned.samples.every_steps, planned.trainer.load_best_model_at_end


def test_one_pass_over_few_rows_is_evaluated_before_and_after(settings_of):
    settings = settings_of()
    # 3 evaluations between 113 steps, 20,000 tokens each, half the work of a trained one.
    assert evaluation_work(settings.trainer, 113, FACTS) == pytest.approx(3 * 10_000 / (113 * 8 / 900 * 180_000))
    assert looks_of(settings) == (113, 113, False)


def test_a_long_run_is_evaluated_at_every_quarter_and_answers_half_way(settings_of):
    assert looks_of(settings_of(), MANY) == (0.25, 0.5, True)
    assert looks_of(settings_of("trainer.save_steps=100"), MANY) == (0.25, 0.5, True)
    assert looks_of(settings_of("trainer.num_train_epochs=3"))[0] == 0.25
    assert looks_of(settings_of("trainer.num_train_epochs=3", "samples.max_new_tokens=170"))[1] == 339


def test_early_stopping_is_given_evaluations(settings_of):
    assert looks_of(settings_of("trainer.early_stopping_patience=2"))[0] == 0.25


def test_what_is_set_stays(settings_of):
    settings = settings_of("trainer.eval_steps=0.125", "samples.every_steps=7")
    assert looks_of(settings) == (0.125, 7, True)


def test_without_held_out_rows_nothing_is_said_of_evaluations(settings_of):
    facts = {"rows": {"train": 900}, "train_tokens": 180_000}
    assert looks_of(settings_of("dataset.eval_fraction=0"), facts)[0] == 0.25


def test_steps_are_counted_as_transformers_does():
    assert (steps_between(0.25, 10), steps_between(0.5, 1), steps_between(1.0, 10), steps_between(4, 10)) == (3, 1, 1, 4)
