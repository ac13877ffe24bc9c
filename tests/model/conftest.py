"""A run that is cut, for the tests of what goes on from there."""

from pathlib import Path

import pytest

from sft.config.schema import Settings
from sft.lifecycle import run
from sft.runs.record import RunResult


@pytest.fixture
def cut_at_first_save(monkeypatch):
    """`cut_at_first_save(settings, folder)`: the result of a run that fails as soon as it has a checkpoint."""

    def cut(settings: Settings, folder: Path) -> RunResult:
        from sft.training.trainer import ResumableTrainer

        def save_and_fail(self, *args, save=ResumableTrainer._save_checkpoint):
            save(self, *args)
            raise RuntimeError("cut")

        with monkeypatch.context() as patch:
            patch.setattr(ResumableTrainer, "_save_checkpoint", save_and_fail)
            return run(settings, folder)

    return cut
