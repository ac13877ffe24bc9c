"""A run from its settings to its report, in the order it happens."""

import contextlib
import logging
import math
import os
import subprocess
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sft import signals
from sft.config import fingerprint
from sft.config.batching import with_batch_plan
from sft.config.destinations import mark
from sft.config.hardware import processes_of
from sft.config.schedule import with_eval_schedule
from sft.config.schema import Backend, Settings, Tracker
from sft.config.trust import WORD, with_word
from sft.distributed import group, strategy, watchdog
from sft.distributed.stop import stop_request
from sft.environment import prepare_environment, quiet_libraries, release_memory, seed_everything
from sft.errors import Refusal, SaveFailed, first_line
from sft.export import exporter, measure, requirements
from sft.generation import samples
from sft.methods import sft
from sft.model import structure, warm_cache
from sft.model.backend import import_backend, limit_memory, settle_backend, torch_dtype
from sft.preflight import checks
from sft.processes import child_environment, python_command
from sft.runs import resume
from sft.runs.failures import log_failure, reason_of
from sft.runs.record import Context, NoRecord, RunRecord, RunResult, machine_facts
from sft.sanitize import without_passwords
from sft.storage import atomic, jsonio
from sft.storage.jsonio import read_json
from sft.tracking.wandb import Tracking
from sft.training import acceleration
from sft.training.checkpoint import find_checkpoint, take_up
from sft.training.metrics import Recorder
from sft.training.sampling import SampleWriter
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
        record = _start_record(settings, folder, context, before)
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
        settings = _settle_backend(settings, before)
        backend = import_backend(settings)
        quiet_libraries()
        seed_everything(settings.seed)
        split = resume.read_batch_plan(before)
        if split and split.gradient_accumulation_steps % processes_of(settings):
            split = None  # decided for another number of processes
        found = checks.examine(settings, folder, backend, context.origins, split)
        if found.problems:
            raise Refusal(found.problems)
        tokenizer, stop_ids, prepared = found.tokenizer, found.stop_ids, found.prepared
        facts = checks.write_preflight(folder, found)
        settings = with_eval_schedule(with_batch_plan(settings, found.split), prepared.facts)
        measure.write_rows(folder, prepared)
        checkpoint = find_checkpoint(folder, before, facts["data_hash"])
        strategy.check_checkpoint(checkpoint, settings)
        _record_data(record, facts, checkpoint)
        record.update(split=asdict(found.split), processes=group.world_size())
        if signed := mark(settings):
            record.update(destinations_mark=signed)
        group.broadcast((settings, checkpoint, facts["data_hash"]))
        tracking = Tracking()
        recorder = Recorder(folder, tracking)
        try:
            status, reason = _train(
                settings, folder, context, backend, tokenizer, stop_ids, prepared, record, recorder, stop, budget, checkpoint
            )
        except Refusal:
            tracking.finish("failed", {})
            raise
        except KeyboardInterrupt as interrupt:
            saved = any((folder / "checkpoints").glob("checkpoint-*"))
            kept = "checkpoints/ has the last state" if saved else "nothing was saved yet"
            status, reason = "stopped", f"{interrupt or 'interrupted'}, at once; {kept}"
        except Exception as raised:  # out of memory, a full disk, a bug: recorded and reported, exit code 1
            error = watchdog.find_cause(raised)
            status, reason = "failed", reason_of(error)
            trace = "".join([traceback.format_exc(), *getattr(error, "__notes__", ())])
            told = {"type": type(error).__name__, "message": str(error), "traceback": trace}
            record.facts["error"] = {key: without_passwords(text) for key, text in told.items()}
            log_failure(error, folder)
        metrics = recorder.final
        tracking.finish(status, metrics)
        record.facts |= {"metrics": metrics, "tracking": tracking.facts}
        return _finish(settings, folder, record, status, reason, metrics, stop)


def _settle_backend(settings: Settings, before: dict | None) -> Settings:
    """The settings with the backend that the run began with, or that this machine calls for."""
    began = ((before or {}).get("model") or {}).get("backend")
    if began in [backend.value for backend in Backend] and settings.model.backend == Backend.auto:
        settings = replace(settings, model=replace(settings.model, backend=Backend(began)))
    settings = settle_backend(settings)
    group.broadcast(settings)
    return settings


def follow() -> int:
    """The same run as seen by any process but the first: it trains with it and writes nothing; returns the exit code.

    Returns only on an error, which the first process is told; else the process ends when the first one does.
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
        settings = group.broadcast(None)  # with the backend that the first one settled on
        backend = import_backend(settings)
        quiet_libraries()
        seed_everything(settings.seed)
        settings, checkpoint, data_hash = group.broadcast(None)  # as decided by the checks, which the first one makes
        tokenizer, stop_ids = warm_cache.load_tokenizer(settings)
        prepared = warm_cache.prepare_data(settings, tokenizer, stop_ids)
        if prepared.facts["data_hash"] != data_hash:
            raise RuntimeError("its rows are others than those of rank 0: the data differ on its machine")
        settings = replace(settings, tracking=replace(settings.tracking, tracker=Tracker.none))
        record, recorder = NoRecord(), Recorder(folder, Tracking())
        stop = stop_request()
        _train(settings, folder, Context(), backend, tokenizer, stop_ids, prepared, record, recorder, stop, budget, checkpoint)
        watchdog.wait_for_end()
    except BaseException as error:
        watchdog.report(error)
    return 1


def _start_record(settings: Settings, folder: Path, context: Context, before: dict | None) -> RunRecord:
    """Write run.json before anything that takes time, so that a run which is killed can be told from an empty folder."""
    if before:
        return RunRecord(folder, before)
    return RunRecord(
        folder,
        name=context.name,
        command=context.command,
        overrides=list(context.overrides),
        working_folder=os.getcwd(),
        tags=list(context.tags),
        config_hash=fingerprint.config_hash(settings),
        seed=settings.seed,
        settings=jsonio.jsonable(settings),
        differs_from_defaults=fingerprint.differs_from(settings, Settings()),
    )


def _record_data(record: RunRecord, facts: dict, checkpoint: Path | None) -> None:
    rows = facts["rows"]
    sessions = [*(record.facts.get("sessions") or []), {"started_at": jsonio.now(), "from": checkpoint and checkpoint.name}]
    record.update(
        data={
            "source": facts["source"],
            "hash": facts["data_hash"],
            "held_out_hash": facts.get("held_out_hash"),
            "train_rows": rows["train"],
            "eval_rows": rows.get("eval", 0),
            "train_tokens": facts["train_tokens"],
            "eval_tokens": facts.get("eval_tokens", 0),
        },
        sessions=sessions,
        **machine_facts(),
    )


def _train(
    settings, folder, context, backend, tokenizer, stop_ids, prepared, record, recorder, stop, budget, checkpoint
) -> tuple[str, str | None]:
    """Load, attach, sample, train, sample, save: (status, reason)."""
    tracking = recorder.tracking
    with record.timed("load"), budget.measured("load"):
        limit_memory(settings)
        acceleration.warm_up(settings, prepared, backend)
        model, source = warm_cache.load_model(settings, backend)
        model = warm_cache.attach_adapter(model, settings, backend)
    total, trained = structure.count_parameters(model)
    facts = {
        "name": settings.model.name,
        "source": source,
        "backend": backend,
        "dtype": str(torch_dtype(settings.model)),
    }
    record.update(model={**facts, "parameters": total, "trainable_parameters": trained})
    log.info("Model  %s through %s: %s of %s parameters trained", source, backend, f"{trained:,}", f"{total:,}")

    prompts = samples.choose_prompts(prepared, settings, tokenizer)
    sharded = strategy.shards(settings)
    asked = [[asdict(prompt) for prompt in prompts], sorted(stop_ids), settings.samples.max_new_tokens]

    def generate(step: int) -> list[dict]:
        check = stop.check if sharded else stop.check_here

        def ask() -> list[dict]:
            return samples.generate(model, tokenizer, prompts, settings, stop_ids, step, backend, check)

        return ask() if step else warm_cache.of_base("answers", model, settings, asked, ask)

    answers = SampleWriter(folder, recorder, record.timed, generate if prompts else None, sharded)
    loop = Loop(folder, stop, recorder, budget, answers, record.timed, checkpoint, settings.trainer.save_total_limit)
    tracking.start(settings, folder, context.name, [*context.tags, backend], record.facts.get("tracking"))
    record.update(tracking=tracking.facts)
    trainer = sft.build_trainer(model, tokenizer, prepared, settings, loop, backend)
    record.update(speed=asdict(trainer.fast))
    take_up(folder, checkpoint, loop.components())
    stop.training = True
    with record.timed("train"):
        trainer.train()
    if trainer.bad_steps.count and trainer.bad_steps.count == trainer.state.global_step:
        stop.failure = stop.failure or f"all {trainer.bad_steps.count} steps had a loss or gradient that is not a finite number"
    _keep_best(trainer, recorder)
    if group.is_first() or sharded:
        with trainer.compute_loss_context_manager(), acceleration.evaluating(model, trainer.fast):
            rows, flat = measure.read_rows(folder), trainer.end_to_end  # what an export of these weights is held against
            loss = measure.flat_loss(model, rows, flat) if flat else measure.row_losses(model, rows)[0]
            recorder.final["proof_loss"] = round(loss, 6)
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if group.is_first():
        name = save_weights(model, tokenizer, settings, folder, weights)
        record.update(artifacts={name: name})
    with contextlib.suppress(signals.Interrupted):
        if not stop.failure:
            stop.check()
            answers.take(trainer.state.global_step)
    if stop.failure:
        return "failed", stop.failure
    if stop.wanted:
        return "stopped", f"{stop.signal or 'time limit'} at step {trainer.state.global_step}"
    if trainer.state.global_step < trainer.state.max_steps:
        return "finished", f"stopped early at step {trainer.state.global_step}: the held-out loss no longer fell"
    return "finished", None


def _keep_best(trainer, recorder) -> None:
    """Note which weights are kept: the best evaluation's where they were loaded back, else the last."""
    state, final = trainer.state, recorder.final
    if state.best_metric is not None:
        final["best_eval_loss"], final["best_step"] = state.best_metric, state.best_global_step
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
            final["eval_loss"] = state.best_metric
            final["kept_step"] = state.best_global_step
            return
    final["kept_step"] = state.global_step
    if recorder.eval_step != state.global_step:  # stopped between evaluations: the last one was of other weights
        final.pop("eval_loss", None)


def save_weights(model: Any, tokenizer: Any, settings: Settings, folder: Path, weights: dict[str, Any] | None = None) -> str:
    """Save the adapter to adapter/ (the whole model to model/ without one), complete or not at all; returns the name.

    `weights` are those of the whole model, where this process has only a share of them.
    """
    name = "adapter" if settings.lora.enabled else "model"
    with _told(name), atomic.new_folder(folder / name, manifest=False) as work:
        embeds = {"embed_tokens", "lm_head"} & {*settings.lora.modules_to_save, *settings.lora.target_modules}
        options = {"save_embedding_layers": bool(embeds)} if settings.lora.enabled else {}
        model.save_pretrained(str(work), **options, **({"state_dict": weights} if weights is not None else {}))
        tokenizer.save_pretrained(work)
        (work / "README.md").unlink(missing_ok=True)  # PEFT's model card, with nothing of this run in it
    return name


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn whatever a library raises when it cannot write into one plain sentence."""
    try:
        yield
    except Exception as error:
        raise SaveFailed(f"{what}/ could not be written: {first_line(error)}") from error


def _finish(settings, folder, record, status, reason, metrics, stop) -> RunResult:
    """Write the report, then the final status, last of all; say how it went."""
    # A run that the clock stopped kept the time for its exports: a borrowed GPU may not come back.
    complete = status == "finished" or (status == "stopped" and stop.out_of_time and not stop.signal)
    failures, cut = _export(folder, record, stop) if complete and settings.export.formats else ([], None)
    if failures:
        reason = "; ".join([*([reason] if reason else []), "trained, but not every export holds: " + " | ".join(failures)])
    if cut:  # to be made when the run goes on
        status, reason = "stopped", "; ".join([*([reason] if reason else []), f"trained; {cut} ended the export"])
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
    eval_loss = metrics.get("eval_loss")
    start = metrics.get("eval_loss_start")
    if eval_loss is not None and start is not None:
        log.info("Done   %s: held-out loss %.4f -> %.4f", status, start, eval_loss)
    else:
        log.info("Done   %s%s", status, f": {reason}" if reason else "")
    if status == "stopped":
        log.info("       go on with: %s", with_word(f"python train.py resume={os.path.relpath(folder)}", settings))
    for name, place in artifacts.items():
        log.info("       %-8s %s", name, os.path.relpath(folder / place))
    good = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
    return RunResult(status, code, folder, good)


def _export(folder: Path, record: RunRecord, stop: signals.StopRequest) -> tuple[list[str], str | None]:
    """Export in a process of its own, which measures what was saved and not what is still in memory: what failed of it, and
    the signal that ended it early.

    The weights are safe by now, so a failure is told and does not undo the run.
    """
    release_memory()
    record.update()  # the export holds the saved weights against what the record says of the training
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
        again = f"python scripts/export.py run={os.path.relpath(folder)} export.formats=[...]"
        log.error("hint: %s   exports again", " ".join([again, *words]))
    return failures, cut


def _runs_code(facts: dict[str, Any]) -> bool:
    model = (facts.get("settings") or {}).get("model")
    return isinstance(model, dict) and model.get("trust_remote_code") is True
