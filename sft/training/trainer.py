"""What happens between two steps: the log line, what is due, the checkpoint, a stop; and going on from there later.

transformers logs, evaluates and saves in one call. Here each part can be given up when the run has to stop: the checkpoint
then says what was still due at its step, and the resumed run does that first, so that its lines are those of a run that
was never cut.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.distributed import group
from sft.model import warm_cache
from sft.model.structure import short_walks
from sft.plan.plan import Plan
from sft.signals import Interrupted, StopRequest
from sft.storage import atomic
from sft.training.checkpoint import place_of, prune, read_state, writing
from sft.training.metrics import Clock, LogLine, mark_on_gpu
from sft.training.nonfinite import NonFiniteSteps
from sft.training.oom import OomRetry
from sft.training.sampling import SampleWriter
from sft.training.time_budget import TimeBudget


@dataclass
class Loop:
    """What the trainer knows of the run around it."""

    folder: Path
    stop: StopRequest
    recorder: Any
    budget: TimeBudget
    answers: SampleWriter
    timed: Callable[[str], Any]
    """Notes in run.json how many seconds a part took."""
    checkpoint: Path | None = None
    """The checkpoint to go on from."""
    save_total_limit: int = 2
    """Checkpoints that are kept. transformers knows of no limit: at 1 it would remove the newest, from which a run goes on."""
    clock: Clock = field(default_factory=Clock)
    ended: bool = False
    """Whether a stop has been answered: nothing more is logged or saved."""
    due: list[str] = field(default_factory=list)
    """What is still to do at the step that has ended: `evaluate`, `samples`."""
    save_due: bool = False
    """Whether a checkpoint belongs to that step, a stop aside."""


def resumable(base: type) -> type:
    """A subclass of TRL's trainer `base` that stops and goes on as the module says; it needs `loop` and `plan`."""
    from transformers.trainer_pt_utils import nested_gather

    class ResumableTrainer(base):
        loop: Loop
        bad_steps: NonFiniteSteps
        smaller: OomRetry
        plan: Plan
        tokens_seen: Any = 0
        tokens_logged: int = 0
        """Those of the step whose line is being written."""
        trained: list[Any] | None = None
        line: LogLine | None = None
        """The line of the last step, not yet written."""

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

        def restore(self) -> None:
            """Take up what transformers does not: call it when training begins, before the first step."""
            if self.loop.checkpoint is None:
                return
            kept = read_state(self.loop.checkpoint)
            self.tokens_seen = kept["tokens"] if group.is_first() else 0
            self.loop.clock.seconds, self.loop.clock.logged = kept["seconds"], kept["logged"]
            self._tr_loss += kept["loss_since_log"]
            self._globalstep_last_logged = kept["last_log"]
            for callback in _early_stopping(self):
                callback.early_stopping_patience_counter = kept["patience_counter"]
            self.bad_steps.count = kept["bad_steps"]
            self.smaller.rows = kept.get("rows_at_once")
            self.loop.budget.earlier = kept.get("needs", {})
            self.state.best_model_checkpoint = self._best_checkpoint()
            self.loop.due, self.loop.save_due = kept["due"], kept["save_due"]
            if self.loop.due:
                self._load_rng_state(str(self.loop.checkpoint))  # what is saved next has to hold this state again
                self.end_step()
            if self.state.global_step >= self.state.max_steps or any(map(_out_of_patience, _early_stopping(self))):
                self.control.should_training_stop = True

        def training_step(self, model, inputs, *args, **kwargs):
            loss = self.smaller.train(super().training_step, model, inputs, *args, **kwargs)
            self.bad_steps.add(loss, inputs)
            return loss

        def _clip_grad_norm(self, model):
            if not self.plan.padding_free:
                return super()._clip_grad_norm(model)
            self.trained = self.trained or [p for p in model.parameters() if p.requires_grad]  # a walk that is made once
            return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

        def _get_grad_norm(self, *args, **kwargs):
            grad_norm = super()._get_grad_norm(*args, **kwargs)
            if hasattr(grad_norm, "full_tensor"):  # of gradients that the processes share
                grad_norm = grad_norm.full_tensor()
            self.bad_steps.guard(grad_norm)
            return grad_norm

        def _run_epoch(self, *, epoch, train_dataloader, **kwargs):
            if not self.control.should_training_stop:  # a run that had ended, but for its last lines
                if group.world_size() > 1:
                    train_dataloader.set_epoch(epoch)  # transformers sets it where it cannot arrive, if passes are skipped
                with short_walks(kwargs["model"]) if self.plan.padding_free else contextlib.nullcontext():
                    super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

        def _maybe_log_save_evaluate(
            self, tr_loss, grad_norm, model, trial, epoch, ignore_keys, start_time, learning_rate=None
        ):
            """In place of transformers' own, which waits for the GPU at every line, with nothing left for it to do."""
            loop, control = self.loop, self.control
            if loop.ended:
                return  # transformers asks once more after the last step of an epoch
            if control.should_evaluate and "evaluate" not in loop.due:
                loop.due.insert(0, "evaluate")
            loop.save_due |= control.should_save
            control.should_evaluate = control.should_save = False
            due = control.should_log  # writing a line takes it back
            self.write_line()
            if due and self.state.global_step > self._globalstep_last_logged:
                self._take_line(tr_loss, grad_norm, learning_rate, start_time)
            if not writes_late(self.args.device) or control.should_training_stop or control.should_epoch_stop:
                self.write_line()
            if not control.should_training_stop:
                loop.stop.out_of_time |= loop.budget.used_up()
                loop.save_due |= loop.budget.wants_measuring
            loop.stop.agree()
            if loop.due or loop.save_due or loop.stop.wanted:
                self.end_step()

        def _take_line(self, tr_loss: Any, grad_norm: Any, learning_rate: float, start_time: float) -> None:
            """Begin to fetch the numbers of this step's line; nothing waits for them."""
            import torch

            loss = nested_gather(tr_loss, self.args.parallel_mode).mean()
            numbers = {"loss": loss, "tokens": self.tokens_seen} | ({} if grad_norm is None else {"norm": grad_norm})
            numbers = {key: n.to("cpu", non_blocking=True) if torch.is_tensor(n) else n for key, n in numbers.items()}
            tr_loss.zero_()  # transformers takes it from itself, and what is no number stays none
            self.line = LogLine(self.state.global_step, self.state.epoch, learning_rate, start_time, numbers)
            self.line.arrived = mark_on_gpu()

        def write_line(self) -> None:
            """Write the line that was taken last, if there is one, as of its step."""
            line, self.line, state = self.line, None, self.state
            if line is None:
                return
            if line.arrived is not None:
                line.arrived.synchronize()
                self.loop.clock.lap(line.arrived)
            loss = float(line.numbers["loss"])
            logs = {"loss": loss / (line.step - self._globalstep_last_logged)}
            logs |= {"grad_norm": float(line.numbers["norm"])} if "norm" in line.numbers else {}
            logs |= {"learning_rate": line.learning_rate}
            self._total_loss_scalar += loss
            self._globalstep_last_logged, self.tokens_logged = line.step, int(line.numbers["tokens"])
            now = state.global_step, state.epoch
            state.global_step, state.epoch = line.step, line.epoch
            try:
                self.log(logs, line.start_time)
            finally:
                state.global_step, state.epoch = now

        def end_step(self) -> None:
            """Do what is due at this step, save if that is due, and end the training if a stop was asked for."""
            loop, step = self.loop, self.state.global_step
            self.write_line()
            loop.clock.stop()
            loop.stop.failure = loop.stop.failure or self.bad_steps.settle()
            for part in list(loop.due):
                if part == "samples" and loop.stop.out_of_time:
                    continue  # the last answers follow, of the weights that are kept
                try:
                    loop.stop.check()
                    with loop.budget.measured(part):
                        if part == "evaluate":
                            loop.save_due |= self._is_new_best()  # at once: a later checkpoint would hold other weights
                        else:
                            loop.answers.take(step)
                except Interrupted:
                    break
                loop.due.remove(part)
            if loop.save_due or loop.stop.wanted:
                with loop.budget.measured("save"):
                    self._save_checkpoint(self.model, None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            if loop.stop.wanted:
                self.control.should_training_stop = loop.ended = True
            if loop.stop.out_of_time and loop.recorder.eval_step != step and self.eval_dataset is not None:
                # For this session's weights alone: the checkpoint, and with it the resumed run, knows nothing of it.
                with contextlib.suppress(Interrupted):
                    self._is_new_best()
                    self.state.best_model_checkpoint = self._best_checkpoint()
            loop.due, loop.save_due = [], False

        def _is_new_best(self) -> bool:
            """Evaluate; whether these weights are the best so far and are to be kept."""
            metrics = self._evaluate(None, None)
            return self._determine_best_metric(metrics, None) and self.args.load_best_model_at_end

        def _evaluate(self, *args, **kwargs):
            with _same_random_state(), self.loop.timed("evaluate"), self.loop.budget.measured("evaluate"):
                return super()._evaluate(*args, **kwargs)

        def _save_checkpoint(self, model, trial):
            """As transformers does, but whole or not at all, and with what `restore` takes up."""
            folder, step = self.loop.folder, self.state.global_step
            self.store_flos()
            kept = {
                "tokens": int(group.total(self.tokens_seen)),
                "seconds": self.loop.clock.seconds,
                "logged": self.loop.clock.logged,
                "loss_since_log": group.total(self._tr_loss) / group.world_size(),
                "last_log": self._globalstep_last_logged,
                "patience_counter": max((c.early_stopping_patience_counter for c in _early_stopping(self)), default=0),
                "bad_steps": self.bad_steps.count,
                "rows_at_once": self.smaller.rows,
                "needs": self.loop.budget.earlier | self.loop.budget.needs,
                "due": self.loop.due,
                "save_due": self.loop.save_due,
                **self.loop.recorder.state(),
            }
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

    return ResumableTrainer


def writes_late(device: Any) -> bool:
    """Whether the line of a step is written while the next one is computed, so that the device never waits for it."""
    return device.type == "cuda"


def _early_stopping(trainer: Any) -> list[Any]:
    from transformers import EarlyStoppingCallback

    return [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]


def _out_of_patience(callback: Any) -> bool:
    return callback.early_stopping_patience_counter >= callback.early_stopping_patience


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Leave torch's random state as it was: an evaluation may come before a stop or after it."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
