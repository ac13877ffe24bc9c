"""A run from its settings to its report, in the order it happens. What is trained, and how, is the method's: sft/methods."""

import contextlib
import logging
import os
from dataclasses import asdict
from pathlib import Path

from sft import methods, signals
from sft.config.destinations import mark
from sft.config.method import facts_of
from sft.config.schema import Settings
from sft.distributed import group, strategy, watchdog
from sft.distributed.stop import stop_request
from sft.environment import prepare_environment
from sft.errors import Refusal
from sft.export import measure, requirements
from sft.export.child import export_run_apart, proof_of
from sft.model import structure, warm_cache
from sft.model.backend import limit_memory, prepare_libraries
from sft.model.hub import read_config
from sft.plan.machine import look
from sft.plan.plan import closed, plan_start, with_model_plan
from sft.preflight import checks
from sft.runs import resume
from sft.runs.failures import error_facts, log_failure, reason_of
from sft.runs.record import Context, RunRecord, RunResult, log_ending, record_session, start_record
from sft.storage import jsonio
from sft.tracking.base import make_trackers
from sft.training import acceleration
from sft.training.checkpoint import find_checkpoint, restore_run, steps_saved
from sft.training.context import RunContext
from sft.training.metrics import Recorder
from sft.training.sampling import SampleWriter, generator
from sft.training.saving import note_kept, save_weights, say_idle_experts
from sft.training.time_budget import TimeBudget
from sft.training.trainer import Loop

log = logging.getLogger(__name__)


def run(settings: Settings, folder: Path, context: Context | None = None) -> RunResult:
    """Train `settings` into `folder`, or go on there if it holds the same run, cut or stopped.

    Raises Refusal before training, also if the folder holds another run, a finished one or one at work; every later
    failure is recorded and returned.
    """
    context = context or Context()
    folder.mkdir(parents=True, exist_ok=True)
    with watchdog.together(lambda: (settings, folder.absolute(), os.getcwd())), resume.locked(folder):
        problems = resume.check_folder(folder, settings, locked=True)
        if problems:
            raise Refusal(problems)
        before = resume.read_record(folder)
        if before and not before.get("config_hash"):
            before = None  # it failed before anything began
        record = start_record(settings, folder, context, before)
        watchdog.watch(record)
        try:
            return _run(settings, folder, context, record, before)
        except (Refusal, KeyboardInterrupt) as ending:
            if isinstance(ending, KeyboardInterrupt) and record.facts.get("sessions") != (before or {}).get("sessions"):
                record.close("stopped", "interrupted a second time, while its ending was written")
                return RunResult("stopped", 130, folder)
            if before:  # nothing happened: leave the folder as it was found
                jsonio.write_json(record.path, before)
            else:
                record.path.unlink()
            raise
        except Exception as error:  # before training, or run.json itself could not be written after it
            log_failure(error, folder)
            with contextlib.suppress(OSError):
                record.close("failed", reason_of(error))
            return RunResult("failed", 1, folder)


def _run(settings: Settings, folder: Path, context: Context, record: RunRecord, before: dict | None) -> RunResult:
    budget = TimeBudget(settings.trainer, requirements.count_artifacts(settings.export))
    prepare_environment()
    stop = stop_request()
    with stop.listening():
        log.info("Run    %s", os.path.relpath(folder))
        machine = look(settings)
        plan = plan_start(settings, machine, lambda: read_config(settings.model), context.provenance, before)
        group.broadcast(plan)
        with record.timed("import"):
            prepare_libraries(plan.backend, settings.seed)
        warm_cache.freeze()
        settings = with_model_plan(settings, plan)
        with record.timed("data"):
            found = checks.examine(settings, folder, plan, context.provenance, machine, resume.read_batch_plan(before))
        if found.problems:
            raise Refusal(found.problems)
        facts = checks.write_preflight(folder, found)
        plan, prepared = found.plan, found.prepared
        settings = closed(settings, plan)
        measure.write_rows(folder, prepared)
        checkpoint = find_checkpoint(folder, before, facts)
        strategy.check_checkpoint(checkpoint, settings)
        record_session(record, settings, facts, checkpoint)
        marked = {"destinations_mark": signed} if (signed := mark(settings)) else {}
        record.update(split=asdict(plan.batch), plan=plan.facts(), processes=group.world_size(), **marked)
        group.broadcast((settings, plan, checkpoint, facts["data_hash"]))
        recorder = Recorder(folder, make_trackers(settings))
        ctx = RunContext(folder, settings, plan, context, record, recorder, stop, budget, found.tokenizer, found.stop_ids,
                         prepared, checkpoint)  # fmt: skip
        try:
            status, reason = train(ctx)
        except Refusal as refusal:
            recorder.tracking.finish("failed", {}, reason_of(refusal))
            raise
        except KeyboardInterrupt as interrupt:
            kept = "checkpoints/ has the last state" if steps_saved(folder) else "nothing was saved yet"
            status, reason = "stopped", f"{interrupt or 'interrupted'}, at once; {kept}"
        except Exception as raised:  # out of memory, a full disk, a bug: recorded and reported, exit code 1
            error = watchdog.find_cause(raised)
            status, reason = "failed", reason_of(error)
            record.facts["error"] = error_facts(error)
            log_failure(error, folder)
        record.facts["metrics"] = recorder.final
        return _finish(ctx, status, reason)


def train(ctx: RunContext) -> tuple[str, str | None]:
    """Load, attach, sample, train, save, sample: (status, reason)."""
    settings, plan, record, recorder, stop = ctx.settings, ctx.plan, ctx.record, ctx.recorder, ctx.stop
    method, sharded = methods.method_of(settings), strategy.shards(settings)
    record.update(tracking=recorder.tracking.begin(settings, ctx.folder, record.facts, plan.backend))
    with record.timed("load"), ctx.budget.measured("load"):
        limit_memory(settings)
        acceleration.warm_up(plan)
        model, source = warm_cache.load_model(settings, plan, lambda model: measure.known_loss(model, ctx.folder))
        model = warm_cache.attach_adapter(model, settings, plan)
    total, trained = (counts := structure.count_parameters(model)).values()
    facts = {"name": settings.model.name, "source": source, "backend": plan.backend, "dtype": f"torch.{plan.dtype}"}
    record.update(model={**facts, **counts, **structure.rounding_of(model)})
    recorder.tracking.describe(counts)
    log.info("Model  %s through %s: %s of %s parameters trained", source, plan.backend, f"{trained:,}", f"{total:,}")

    writer = SampleWriter(ctx.folder, recorder, record.timed, generator(ctx, model), sharded)
    loop = Loop(ctx.folder, stop, recorder, ctx.budget, writer, record.timed, ctx.checkpoint, settings.trainer.save_total_limit)
    with record.timed("prepare"):
        trainer = method.build_trainer(ctx, model, loop)
    record.update(speed=trainer.plan.speed(), plan=trainer.plan.facts())
    restore_run(ctx.folder, ctx.checkpoint, loop.components())
    stop.training = True
    with record.timed("train"):
        trainer.train()
    if trainer.nonfinite.count and trainer.nonfinite.count == trainer.state.global_step:
        stop.failure = stop.failure or f"all {trainer.nonfinite.count} steps had a loss or gradient that is not a finite number"
    note_kept(trainer, recorder)
    if group.is_first() or sharded:
        recorder.final["proof_loss"] = round(method.held_out_loss(ctx, trainer), 6)
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if group.is_first():
        say_idle_experts(model)
        name = save_weights(model, ctx.tokenizer, settings, ctx.folder, weights)
        record.update(artifacts={name: name})
    with contextlib.suppress(signals.Interrupted):
        if not stop.failure:
            stop.check()
            writer.take(trainer.state.global_step)
    if stop.failure:
        return "failed", stop.failure
    if stop.wanted:
        return "stopped", f"{stop.signal or 'time limit'} at step {trainer.state.global_step}"
    if trainer.state.global_step < trainer.state.max_steps:
        return "finished", f"stopped early at step {trainer.state.global_step}: the held-out rows got no better"
    return "finished", None


def _finish(ctx: RunContext, status: str, reason: str | None) -> RunResult:
    """Export, end the tracking, write the report, then the final status, last of all; say how it went."""
    folder, record, stop, metrics = ctx.folder, ctx.record, ctx.stop, ctx.recorder.final
    # A run that the clock stopped kept the time for its exports: a borrowed GPU may not come back.
    complete = status == "finished" or (status == "stopped" and stop.out_of_time and not stop.signal)
    failures, cut = export_run_apart(folder, record, stop) if complete and ctx.settings.export.formats else ([], None)
    if failures:
        reason = "; ".join([*([reason] if reason else []), "trained, but not every export holds: " + " | ".join(failures)])
    if cut:  # to be made when the run goes on
        status, reason = "stopped", "; ".join([*([reason] if reason else []), f"trained; {cut} ended the export"])
    ctx.recorder.tracking.finish(status, {**metrics, **proof_of(folder)}, reason)
    record.facts["tracking"] = ctx.recorder.tracking.state()
    code = 1 if failures else {"finished": 0, "failed": 1, "stopped": 130 if stop.signal else 0}[status]
    artifacts = {**(record.facts.get("artifacts") or {}), "report": "report.html"}
    ending = {"status": status, "reason": reason, "artifacts": artifacts, "ended_at": jsonio.now()}
    try:
        from sft.report.page import write_report  # brings a chart engine with it, which only this line needs

        write_report(folder, jsonio.jsonable({**record.facts, **ending}))
    except Exception as error:  # a report that cannot be drawn must not turn a good run into a failed one
        log.warning("The report could not be written: %s", error)
        artifacts.pop("report", None)
    record.close(status, reason, artifacts=artifacts)
    log_ending(ctx.settings, folder, record.facts)
    return RunResult(status, code, folder, jsonio.number(metrics.get(facts_of(record.facts).metric)))
