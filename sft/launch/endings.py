"""Every ending of a run turned into a result, and the check of a run that is not trained."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sft import console, environment
from sft.config.schema import Settings
from sft.errors import Refusal
from sft.model import warm_cache
from sft.model.hub import read_config
from sft.plan.machine import look as look_at
from sft.plan.plan import plan_start, with_model_plan
from sft.preflight import checks, show
from sft.preflight.findings import Found
from sft.runs import record, resume
from sft.runs.failures import log_failure, reason_of
from sft.runs.record import Context, RunResult


def check_only(settings: Settings, folder: Path, context: Context) -> RunResult:
    """Check everything that a run would, and show it. Nothing is trained, and the run folder that Hydra made is removed.

    Raises Refusal, after everything was shown, if the run would be refused.
    """
    environment.prepare_environment()
    environment.quiet_libraries()
    machine = look_at(settings)
    plan = plan_start(settings, machine, lambda: read_config(settings.model), context.provenance)
    found = checks.examine(with_model_plan(settings, plan), folder, plan, context.provenance, machine)
    if console.wants_json():
        return _say_checks(found, folder)
    show.show(found)
    if found.problems:
        raise Refusal(found.problems)
    _remove_unused(folder)
    if folder.parent == Path("outputs").absolute():
        with contextlib.suppress(OSError):  # it holds runs
            folder.parent.rmdir()
    return RunResult("checked", 0, folder)


def _say_checks(found: Found, folder: Path) -> RunResult:
    """Print what was found as one JSON object, with the problems under `refused`."""
    facts = {**(found.prepared.facts if found.prepared else {}), **found.facts}
    refused = {"refused": console.refused(found.problems)} if found.problems else {}
    console.say_json({**refused, "checks": [asdict(line) for line in found.lines], "warnings": found.warnings, "facts": facts})
    _remove_unused(folder)
    return RunResult("refused", 2, folder) if found.problems else RunResult("checked", 0, folder)


def guarded(start: Callable[[], RunResult], folder: Path, context: Context, sweeping: bool) -> RunResult:
    """Run `start` and turn every ending into a result; a sweep keeps the folder of a job that was refused, as a row."""
    overrides = list(context.overrides)
    try:
        return start()
    except Refusal as refusal:
        if sweeping:
            console.say(refusal)
        else:
            console.say_refusal(refusal)
        if sweeping and not (folder / "run.json").exists():  # else it is that of another run
            record.RunRecord(folder, name=context.name, overrides=overrides).close("failed", reason_of(refusal))
        else:
            _remove_unused(folder)
        return RunResult("refused", 2, folder)
    except KeyboardInterrupt:
        console.say("Interrupted; nothing was lost that had been saved before.")
        _remove_unused(folder)
        return RunResult("stopped", 130, folder)
    except Exception as error:  # a full disk or a bug outside of training; run() records those inside
        log_failure(error, folder)
        with contextlib.suppress(OSError):
            if not (folder / "run.json").exists():
                record.RunRecord(folder, name=context.name, overrides=overrides).close("failed", reason_of(error))
        return RunResult("failed", 1, folder)
    finally:
        warm_cache.release()


def _remove_unused(folder: Path) -> None:
    """Remove a run folder in which nothing happened: only Hydra's copy of the config, the log and the data's facts."""
    ours = {".hydra", "train.log", "preflight.json"}
    with contextlib.suppress(OSError, Refusal), resume.locked(folder):  # a run that has just begun holds the lock
        if {p.name for p in folder.iterdir()} <= ours:
            shutil.rmtree(folder, ignore_errors=True)
