"""Where command lines are checked."""

import pytest


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """An empty folder, on a machine without a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
