"""Exports made in a process of their own, which measures what was saved and not what is still in memory."""

import contextlib
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

from sft.config.consent import WORD
from sft.distributed import group
from sft.environment import release_memory
from sft.export import exporter
from sft.processes import child_environment, python_command
from sft.programs import as_called
from sft.runs.record import RunRecord
from sft.signals import StopRequest
from sft.storage.jsonio import read_json

log = logging.getLogger(__name__)


def export_run_apart(folder: Path, record: RunRecord, stop: StopRequest) -> tuple[list[str], str | None]:
    """Export the run in `folder`: what failed of it, and the signal that ended it early.

    The weights are safe by now, so a failure is told and does not undo the run.
    """
    release_memory()
    record.update()  # the export compares the saved weights with what the record says of the training
    environment = {**group.plain_environment(), "PYTHONPATH": child_environment()["PYTHONPATH"]}
    words = [WORD] if _runs_code(record.facts) else []  # this command has it from its user
    with record.timed("export"):
        child = subprocess.Popen([*python_command("sft.export"), *words, str(folder)], env=environment)
        while child.poll() is None:
            if stop.signal:
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.5)
    report = read_json(folder / "export" / "verify.json")
    artifacts = {
        f"export/{n}": f["path"] for n, f in (report.get("artifacts") or {}).items() if f and f.get("path") and n != "adapter"
    }
    record.update(artifacts={**(record.facts.get("artifacts") or {}), **artifacts})
    failures = exporter.failures(report) if report else []
    cut = stop.signal if child.returncode and not failures else None
    if child.returncode and not failures and not cut:
        failures = [f"the export ended early, with exit code {child.returncode}"]
    for line in failures:
        log.error("export: %s", line)
    if failures:
        again = as_called(f"python scripts/export.py run={os.path.relpath(folder)} export.formats=[...]")
        log.error("hint: %s   exports again", " ".join([again, *words]))
    return failures, cut


def proof_of(folder: Path) -> dict[str, Any]:
    """What trackers are told of a run's exports: of each its loss and reward on the held-out rows and whether it is what
    was trained."""
    found: dict[str, Any] = {}
    for name, facts in (read_json(folder / "export" / "verify.json").get("artifacts") or {}).items():
        if facts:
            found[f"export/{name}/holds"] = facts.get("status") == "ok"
            found |= {
                f"export/{name}/{key}": facts[key] for key in ("loss", "reward", "size_bytes") if facts.get(key) is not None
            }
    return found


def _runs_code(facts: dict[str, Any]) -> bool:
    model = (facts.get("settings") or {}).get("model")
    return isinstance(model, dict) and model.get("trust_remote_code") is True
