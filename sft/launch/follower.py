"""A run as seen by any of its processes but the first."""

import logging
import os

from sft.distributed import group, watchdog
from sft.distributed.stop import stop_request
from sft.environment import prepare_environment
from sft.lifecycle import train
from sft.model import warm_cache
from sft.model.backend import prepare_libraries
from sft.runs.record import Context, NoRecord
from sft.tracking.base import Trackers
from sft.training.context import RunContext
from sft.training.metrics import Recorder
from sft.training.time_budget import TimeBudget


def follow() -> int:
    """The same run as seen by any process but the first: it trains with it and writes nothing; returns the exit code.

    Returns only on an error, which is reported to the first process; else the process ends when the first one does.
    """
    logging.disable(logging.CRITICAL)  # one speaks for all
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        watchdog.meet()
        settings, folder, place = group.broadcast(None)
        os.chdir(place)
        watchdog.watch(folder)
        budget = TimeBudget(settings.trainer)
        prepare_environment()
        prepare_libraries(group.broadcast(None).backend, settings.seed)
        settings, plan, checkpoint, data_hash = group.broadcast(None)  # as decided by the checks, which the first one makes
        tokenizer, stop_ids = warm_cache.load_tokenizer(settings)
        prepared = warm_cache.prepare_data(settings, tokenizer, stop_ids)
        if prepared.facts["data_hash"] != data_hash:
            raise RuntimeError("its rows are others than those of rank 0: the data differ on its machine")
        recorder = Recorder(folder, Trackers())
        train(RunContext(folder, settings, plan, Context(), NoRecord(), recorder, stop_request(), budget, tokenizer, stop_ids,
                         prepared, checkpoint))  # fmt: skip
        watchdog.wait_for_end()
    except BaseException as error:
        watchdog.report(error)
    return 1
