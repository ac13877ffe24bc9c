"""What happens between two steps: the log line, what is due, the checkpoint, a stop; and going on from there later.

transformers logs, evaluates and saves in one call. Here each part can be given up when the run has to stop: the checkpoint
then says what was still due at its step, and the resumed run does that first, so that its lines are those of a run that
was never cut. `StepEnd` draws the states in which the end of a step can be.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.data.collators import cut
from sft.distributed import group
from sft.model import warm_cache
from sft.model.structure import short_walks
from sft.plan.plan import Plan
from sft.signals import Interrupted, StopRequest
from sft.storage import atomic
from sft.training.checkpoint import Component, gather_state, load_components, place_of, prune, writing
from sft.training.context import RunContext
from sft.training.metrics import Clock, LogLine, mark_on_gpu
from sft.training.nonfinite import NonFiniteSteps
from sft.training.oom import OomRetry
from sft.training.sampling import SampleWriter
from sft.training.step_end import EarlyStopping, LogCounts, StepEnd
from sft.training.time_budget import TimeBudget


@dataclass
class Loop:
    """What the trainer knows of the run around it."""

    folder: Path
    stop: StopRequest
    recorder: Any
    budget: TimeBudget
    sample_writer: SampleWriter
    timed: Callable[[str], Any]
    """Notes in run.json how many seconds a part took."""
    checkpoint: Path | None = None
    """The checkpoint to go on from."""
    save_total_limit: int = 2
    """Checkpoints that are kept. transformers knows of no limit: at 1 it would remove the newest, from which a run goes on."""
    clock: Clock = field(default_factory=Clock)
    end: StepEnd = field(default_factory=StepEnd)

    def components(self) -> dict[str, Component]:
        """What a checkpoint keeps of the run around the trainer."""
        return {"recorder": self.recorder, "clock": self.clock, "time_budget": self.budget, "step_end": self.end}


class ResumableTrainer:
    """Put before one of TRL's trainers as a base, it makes that trainer stop and go on as the module says.

    It needs `ctx`, `loop`, `plan`, `nonfinite` and `oom_retry` set before it trains.
    """

    ctx: RunContext
    loop: Loop
    nonfinite: NonFiniteSteps
    oom_retry: OomRetry
    plan: Plan
    tokens_seen: Any = 0
    tokens_logged: int = 0
    """Those of the step whose line is being written."""
    trained: list[Any] | None = None
    line: LogLine | None = None
    """The line of the last step, not yet written."""
    written: LogLine | None = None
    """The line that is being written."""
    shown: tuple[str, ...] = ()
    """What the method logs besides the loss; with `eval_` before it, of an evaluation."""
    epoch_rows: int | None = None
    """Rows of an epoch, if they are not those of the data."""
    cut = staticmethod(cut)
    """Takes a micro-batch apart into what the collator made it of."""

    # ------------------------------------------------------------------------------------------ from where it begins

    def train(self, **kwargs):
        if self.loop.checkpoint:
            self.args.eval_on_start = False
            kwargs["resume_from_checkpoint"] = str(self.loop.checkpoint)
        try:
            return super().train(**kwargs)
        except BaseException:
            if group.world_size() == 1:  # others may be gone, and would be waited for
                with contextlib.suppress(Exception):  # so may the GPU
                    self.write_line()
            raise
        finally:
            warm_cache.thaw()

    def components(self) -> dict[str, Component]:
        """What a checkpoint keeps of the trainer beside transformers' own files."""
        return {
            "log": LogCounts(self),
            "early_stopping": EarlyStopping(self),
            "nonfinite_steps": self.nonfinite,
            "oom_retry": self.oom_retry,
        }

    def restore(self) -> None:
        """Take up what transformers does not: call it when training begins, before the first step."""
        if self.loop.checkpoint is None:
            return
        load_components(self.loop.checkpoint, self.components())
        self.state.best_model_checkpoint = self._best_checkpoint()
        if self.loop.end.due:
            self._load_rng_state(str(self.loop.checkpoint))  # what is saved next has to hold this state again
            self.end_step()
        if self.state.global_step >= self.state.max_steps or EarlyStopping(self).out_of_patience:
            self.control.should_training_stop = True

    # ------------------------------------------------------------------------------------------ a step

    def training_step(self, model, inputs, *args, **kwargs):
        loss = self.oom_retry.train(super().training_step, model, inputs, *args, **kwargs)
        self.nonfinite.add(loss, inputs)
        return loss

    def repeat_step(self) -> None:
        """An OOM retry begins the step anew: what a method has counted of it by now does not count."""

    def row_numbers(self, inputs) -> list[int] | None:
        """The numbers in the data of the rows of a micro-batch; None if they are to be found by their tokens."""

    def _clip_grad_norm(self, model):
        if not self.plan.padding_free:
            return super()._clip_grad_norm(model)
        self.trained = self.trained or [p for p in model.parameters() if p.requires_grad]  # a walk that is made once
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, *args, **kwargs):
        grad_norm = super()._get_grad_norm(*args, **kwargs)
        if hasattr(grad_norm, "full_tensor"):  # of gradients that the processes share
            grad_norm = grad_norm.full_tensor()
        self.nonfinite.guard(grad_norm)
        return grad_norm

    def _run_epoch(self, *, epoch, train_dataloader, **kwargs):
        if not self.control.should_training_stop:  # a run that had ended, but for its last lines
            if group.world_size() > 1:
                train_dataloader.set_epoch(epoch)  # transformers sets it where it cannot arrive, if micro-batches are skipped
            with short_walks(kwargs["model"]) if self.plan.padding_free else contextlib.nullcontext():
                super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    # ------------------------------------------------------------------------------------------ the end of a step

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys, start_time, learning_rate=None):
        """In place of transformers' own, which waits for the GPU at every line, with nothing left for it to do."""
        loop, control = self.loop, self.control
        if loop.end.ended:
            return  # transformers asks once more after the last step of an epoch
        loop.end.take_over(control)
        log_due = control.should_log  # writing a line takes it back
        self.write_line()
        if log_due and self.state.global_step > self._globalstep_last_logged:
            self.take_line(tr_loss, grad_norm, learning_rate, start_time)
        if not writes_late(self.args.device) or control.should_training_stop or control.should_epoch_stop:
            self.write_line()
        if not control.should_training_stop:
            loop.stop.out_of_time |= loop.budget.used_up()
            loop.end.save_due |= loop.budget.wants_measuring
        loop.stop.agree()
        if loop.end.pending or loop.stop.wanted:
            self.end_step()

    def end_step(self) -> None:
        """Do what is due at this step, save if that is due, and end the training if a stop was requested."""
        loop = self.loop
        self.write_line()
        loop.clock.stop()
        loop.stop.failure = loop.stop.failure or self.nonfinite.settle()
        with contextlib.suppress(Interrupted):  # what has not been done stays due
            self._do_due()
        if loop.end.save_due or loop.stop.wanted:
            with loop.budget.measured("save"):
                self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if loop.stop.wanted:
            self.control.should_training_stop = loop.end.ended = True
        if loop.stop.out_of_time:
            self._evaluate_for_this_session()
        loop.end.clear()

    def _do_due(self) -> None:
        """Evaluate, take samples. Raises Interrupted where a stop gives that up."""
        loop = self.loop
        for part in list(loop.end.due):
            if part == "samples" and loop.stop.out_of_time:
                continue  # the last completions follow, of the weights that are kept
            loop.stop.check()
            with loop.budget.measured(part):
                if part == "evaluate":
                    loop.end.save_due |= self._is_new_best()  # at once: a later checkpoint would hold other weights
                else:
                    loop.sample_writer.take(self.state.global_step)
            loop.end.due.remove(part)

    def _evaluate_for_this_session(self) -> None:
        """Evaluate the last weights, if that was not due: the checkpoint, and with it the resumed run, knows nothing of it."""
        if self.loop.recorder.eval_step == self.state.global_step or self.eval_dataset is None:
            return
        with contextlib.suppress(Interrupted):
            self._is_new_best()
            self.state.best_model_checkpoint = self._best_checkpoint()

    # ------------------------------------------------------------------------------------------ the log line

    def take_line(self, tr_loss: Any, grad_norm: Any, learning_rate: float, start_time: float) -> None:
        """Begin to fetch the numbers of this step's line; nothing waits for them."""
        import torch
        from transformers.trainer_pt_utils import nested_gather

        loss = nested_gather(tr_loss, self.args.parallel_mode).mean()
        numbers = {"loss": loss, "tokens": self.tokens_seen} | ({} if grad_norm is None else {"norm": grad_norm})
        numbers = {key: n.to("cpu", non_blocking=True) if torch.is_tensor(n) else n for key, n in numbers.items()}
        tr_loss.zero_()  # transformers takes it from itself, and what is no number stays none
        self.line = LogLine(self.state.global_step, self.state.epoch, learning_rate, start_time, numbers)
        self.line.arrived = mark_on_gpu()

    def write_line(self) -> None:
        """Write the line that was taken last, if there is one, as of its step."""
        line, self.line = self.line, None
        if line is None:
            return
        if line.arrived is not None:
            line.arrived.synchronize()
            self.loop.clock.lap(line.arrived)
        logs = line.logs(since=self._globalstep_last_logged)
        self._total_loss_scalar += float(line.numbers["loss"])
        self._globalstep_last_logged, self.tokens_logged = line.step, int(line.numbers["tokens"])
        self.written = line
        with _as_of(self.state, line.step, line.epoch):
            self.log(logs, line.start_time)
        self.written = None

    # ------------------------------------------------------------------------------------------ evaluation, checkpoint

    def _is_new_best(self) -> bool:
        """Evaluate; whether these weights are the best so far and are to be kept."""
        metrics = self._evaluate(None, None)
        return self._determine_best_metric(metrics, None) and self.args.load_best_model_at_end

    def _evaluate(self, *args, **kwargs):
        with _same_random_state(), self.loop.timed("evaluate"), self.loop.budget.measured("evaluate"):
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        """As transformers does, but whole or not at all, and with what `restore` reads."""
        folder, step = self.loop.folder, self.state.global_step
        self.store_flos()
        kept = gather_state(self.loop.components() | self.components())
        self.state.best_model_checkpoint = self._best_checkpoint()
        with group.shared_folder(writing(folder, step, kept)) as work:
            self.save_model(str(work), _internal_call=True)
            self._save_optimizer_and_scheduler(str(work))
            self._save_scaler(str(work))
            self._save_rng_state(str(work))
            if group.is_first():
                self.state.save_to_json(str(work / "trainer_state.json"))
        if group.is_first():
            prune(folder, self.loop.save_total_limit, self.state.best_global_step)

    def _best_checkpoint(self) -> str | None:
        """The checkpoint of the best step, which is this one or is there; the run folder may have moved since."""
        best = self.state.best_global_step
        place = place_of(self.loop.folder, best or 0)
        whole = best and (best == self.state.global_step or atomic.find_damage(place, hashes=False) is None)
        return str(place) if whole else None


def writes_late(device: Any) -> bool:
    """Whether the line of a step is written while the next one is computed, so that the device never waits for it."""
    return device.type == "cuda"


@contextlib.contextmanager
def _as_of(state: Any, step: int, epoch: float) -> Iterator[None]:
    """Have transformers' state stand at a step that is past."""
    now = state.global_step, state.epoch
    state.global_step, state.epoch = step, epoch
    try:
        yield
    finally:
        state.global_step, state.epoch = now


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Leave torch's random state as it was: an evaluation may come before a stop or after it."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
