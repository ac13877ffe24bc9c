"""Losses that rise are told from noise, and gradients of 0 are told."""

import random

from sft.training.nonfinite import WINDOW, NonFiniteSteps, rises_steadily


def test_a_steady_rise_is_told_once_and_noise_is_none(caplog):
    """Of flat losses as noisy as those of small batches, next to none are called rising; a clear climb is."""
    noise = random.Random(0)
    flat = [[2 + noise.gauss(0, 0.3) for _ in range(4 * WINDOW)] for _ in range(2000)]
    assert sum(map(rises_steadily, flat)) <= 2
    falling = [3 - 0.02 * k + noise.gauss(0, 0.3) for k in range(4 * WINDOW)]
    rising = [2 + 0.05 * k + noise.gauss(0, 0.1) for k in range(4 * WINDOW)]
    assert not rises_steadily(falling) and rises_steadily(rising) and not rises_steadily(rising[1:])
    watcher = NonFiniteSteps(None, None, 0)
    with caplog.at_level("WARNING"):
        for step, loss in enumerate([*flat[0], *rising, *(loss + 2 for loss in rising)], 1):
            watcher.watch(step, loss)
    assert watcher.rose_at is not None and watcher.rose_at > 4 * WINDOW
    assert [r.message.count("rises steadily") for r in caplog.records] == [1]


def test_gradients_of_zero_in_a_row_are_told_once(caplog):
    watcher = NonFiniteSteps(None, None, 0)
    with caplog.at_level("WARNING"):
        for step, norm in enumerate([0.0, 0.0, 0.1, None, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], 1):
            watcher.watch(step, 2.0, norm)
    assert watcher.still_at == 7 and [r.message[:45] for r in caplog.records] == [
        "Step 7: the gradients of the last 3 logged st"
    ]
