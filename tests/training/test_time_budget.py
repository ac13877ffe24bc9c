"""Time limits: moments by the clock, and what is kept for the ending."""

import time
from datetime import datetime, timedelta

import pytest

from sft.config.rules import moment_of
from sft.config.schema import ExportSettings, TrainerSettings
from sft.export.requirements import count_artifacts
from sft.training.time_budget import FINISH, IMPORTS, MARGIN, TimeBudget

NOON = datetime(2026, 3, 1, 12, 0).astimezone()


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("17:30", NOON.replace(hour=17, minute=30)),
        ("9:05", NOON.replace(hour=9, minute=5) + timedelta(days=1)),
        ("12:00", NOON + timedelta(days=1)),
        ("2026-12-31 17:30", datetime(2026, 12, 31, 17, 30, tzinfo=NOON.tzinfo)),
    ],
)
def test_moments(text, at):
    assert moment_of(text, NOON) == at


@pytest.mark.parametrize("text", ["later", "25:00", "17:75", "5pm", "2026-12-31", "2026-13-01 10:00", "17.30"])
def test_what_is_no_moment(text):
    with pytest.raises(ValueError):
        moment_of(text, NOON)


def test_the_ending_gets_the_longest_times_that_were_measured():
    budget = TimeBudget(TrainerSettings(max_hours=1.0))
    assert budget.wants_measuring and not budget.used_up()
    for part, seconds in (("step", 2), ("step", 1), ("evaluate", 20), ("samples", 10), ("save", 5)):
        budget.note(part, seconds)
    assert budget.reserve == pytest.approx(MARGIN * (2 + 2 * 20 + 10 + 5 + 5) + FINISH) and not budget.wants_measuring
    budget.deadline = time.monotonic() + budget.reserve + 1
    assert not budget.used_up()
    budget.note("evaluate", 22)
    assert budget.used_up()


def test_the_session_before_counts_until_this_one_has_measured():
    budget = TimeBudget(TrainerSettings(max_hours=1.0))
    budget.earlier = {"evaluate": 100.0, "save": 40.0}
    budget.note("evaluate", 20)  # a faster machine
    assert budget.reserve == pytest.approx(MARGIN * (2 * 20 + 2 * 40) + FINISH) and budget.wants_measuring


def test_each_export_and_the_model_it_is_held_against_get_their_time():
    budget = TimeBudget(TrainerSettings(max_hours=1.0), exports=2)
    for part, seconds in (("load", 3), ("evaluate", 20), ("samples", 10)):
        budget.note(part, seconds)
    assert budget.reserve == pytest.approx(MARGIN * (2 * 20 + 10 + 3 * (3 + 3 + 20 + 10) + IMPORTS) + FINISH)
    wanted = ExportSettings(formats=["adapter", "gguf"])
    assert count_artifacts(wanted) == 1 + len(wanted.gguf.quantizations) and count_artifacts(ExportSettings()) == 0


def test_the_earlier_limit_counts_and_a_past_one_does_not(caplog):
    soon = (datetime.now() + timedelta(minutes=2)).strftime("%Y-%m-%d %H:%M")
    assert TimeBudget(TrainerSettings(max_hours=1.0, stop_at=soon)).deadline < time.monotonic() + 121
    assert TimeBudget(TrainerSettings(stop_at="2020-01-01 10:00")).deadline is None and "is past" in caplog.text
    assert TimeBudget(TrainerSettings()).deadline is None
