"""What travels together through one run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config.schema import Settings
from sft.data.token_cache import Prepared
from sft.plan.plan import Plan
from sft.runs.record import Context, NoRecord, RunRecord
from sft.signals import StopRequest
from sft.training.metrics import Recorder
from sft.training.time_budget import TimeBudget


@dataclass
class RunContext:
    """One run in one process: what was decided for it, and what it writes to."""

    folder: Path
    settings: Settings
    """With what the plan decided in place of `auto` and null."""
    plan: Plan
    command: Context
    record: RunRecord | NoRecord
    recorder: Recorder
    stop: StopRequest
    budget: TimeBudget
    tokenizer: Any
    stop_ids: set[int]
    """Tokens that end a completion."""
    prepared: Prepared
    checkpoint: Path | None
    """Where the run goes on from."""
