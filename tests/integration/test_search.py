"""A search through Hydra's Optuna sweeper, killed and repeated."""

import importlib.util

import pytest

from tests.integration.test_sweep import QUICK, jobs_of, kill_after, log_of, place, start, sweep  # noqa: F401

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason='needs the extra: pip install -e ".[optuna]"'
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_survives_failures_and_a_kill_and_proposes_the_same_again(place):  # noqa: F811
    """Jobs of five rows are out of memory: rows of the table, done again by the repeated command and nothing else is."""
    command = ("sweep=tpe", *QUICK, "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.n_startup_trials=3",
               "trainer.per_device_train_batch_size=choice(1,5)", "hydra.sweep.dir=s")  # fmt: skip
    kill_after(start(place, *command), place / "s", 3)
    before = jobs_of(place / "s")
    assert sweep(place, *command) == 1, log_of(place)[-3000:]
    jobs = jobs_of(place / "s")
    assert len(jobs) == 6 and [job["config_hash"] for job in jobs[: len(before)]] == [job["config_hash"] for job in before]
    failed = [job for job in jobs if job["status"] == "failed"]
    assert 0 < len(failed) < 6 and all("planted: 5 rows do not fit" in job["reason"] for job in failed)
    finished = [job for job in jobs if job["status"] == "finished"]
    assert len(finished) + len(failed) == 6 and sum(job["attempts"] - 1 for job in finished) <= 1
    assert all(job["overrides"]["trainer.per_device_train_batch_size"] == "1" for job in finished)
    assert len((place / "s" / "leaderboard.csv").read_text(encoding="utf-8").splitlines()) == 7
    assert "best_value" in (place / "s" / "optimization_results.yaml").read_text(encoding="utf-8")


def test_a_search_whose_jobs_all_fail_ends_with_its_table(place):  # noqa: F811
    command = ("sweep=random", *QUICK, "hydra.sweeper.n_trials=2", "trainer.per_device_train_batch_size=5",
               "lora.r=choice(2,4)", "hydra.sweep.dir=s")  # fmt: skip
    assert sweep(place, *command) == 1, log_of(place)[-3000:]
    assert {job["status"] for job in jobs_of(place / "s")} == {"failed"}
    told = log_of(place).rpartition("Search no job has a held-out loss")[2]
    assert "failed" in told and "leaderboard.csv" in told and "planted: 5 rows do not fit" in told and "Traceback" not in told
