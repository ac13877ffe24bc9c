"""What happens at the end of a step and of an evaluation, and the progress bar."""

import logging
import math
from typing import Any

from sft.config.method import METHODS
from sft.config.schedule import steps_between
from sft.console import duration
from sft.distributed import group, strategy
from sft.environment import peak_allocated_gib, peak_memory_gib
from sft.errors import ModelFault
from sft.model import cuda_graphs, warm_cache
from sft.training import samplers
from sft.training.trainer import writes_late

log = logging.getLogger(__name__)

FIRST = 3
"""Steps that say nothing of the others: layers are compiled and micro-batches captured in them."""


class RunEvents:
    """Put before transformers' callback as a base, it writes the log lines of a trainer, keeps time, and asks for what is due.

    `trainer` is a ResumableTrainer.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.settings = trainer, trainer.ctx.settings
        self.loop, self.clock, self.recorder = trainer.loop, trainer.loop.clock, trainer.loop.recorder
        self.method = METHODS[self.settings.method.name.value]

    def on_train_begin(self, args, state, control, **kwargs):
        strategy.spread_random_state(self.settings.seed)
        self.trainer.restore()
        self.step_ended, self.steps = self.clock.seconds, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.loop.stop.check()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # after their held-out loss
            with self.loop.budget.measured("samples"):
                self.loop.sample_writer.take(0)
        self.clock.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not writes_late(args.device):
            self.clock.lap()
        line = {"step": state.global_step, "epoch": self.epochs(state)}
        line |= {k: logs[k] for k in ("loss", "eval_loss", "learning_rate", "grad_norm") if k in logs}
        line |= {k: round(logs[k], 6) for k in logs if k.removeprefix("eval_") in self.trainer.shown}
        if "loss" in logs:
            line |= self.watch_step(state.global_step, logs) | self.speed_so_far()
        if self.method.metric in logs:
            self.say_evaluation(state.global_step, logs)
        if "loss" in logs or self.method.metric in logs:
            self.recorder.add(line)

    def watch_step(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        """What was not as it should be up to a step; the run is to end where that was too often."""
        nonfinite, oom_retry, stop = self.trainer.nonfinite, self.trainer.oom_retry, self.loop.stop
        stop.failure = stop.failure or nonfinite.settle(step)
        found = {"bad_steps": nonfinite.count} if nonfinite.count else {}
        nonfinite.watch(step, logs["loss"], logs.get("grad_norm"))
        return found | ({"rows_at_once": oom_retry.rows} if oom_retry.rows else {})

    def speed_so_far(self) -> dict[str, Any]:
        """Tokens of all processes, those a second since the last line, and the largest peak of memory."""
        clock = self.clock
        seen, peaks = zip(*group.gathered((self.trainer.tokens_logged, peak_memory_gib())), strict=True)
        tokens, seconds = sum(seen), clock.seconds
        rate = (tokens - clock.logged["tokens"]) / max(seconds - clock.logged["seconds"], 1e-9)
        clock.logged = {"tokens": tokens, "seconds": seconds}
        return {"tokens": tokens, "tokens_per_second": round(rate, 1), "memory_gib": max(peaks)}

    def say_evaluation(self, step: int, logs: dict[str, Any]) -> None:
        """Say what an evaluation found. Raises ModelFault where the model's own is not a finite number."""
        method, shown = self.method, self.trainer.shown
        others = [f"eval_{name}" for name in shown[:2] if f"eval_{name}" != method.metric]
        more = "".join(f", {name.removeprefix('eval_')} {logs[name]:.3f}" for name in others)
        log.info("step %4d   %s %.4f%s", step, method.title, logs[method.metric], more)
        if step == 0 and not math.isfinite(logs[method.metric]):
            why = f"The model's {method.title} before the first step is not a finite number. Its weights are the cause,"
            raise ModelFault(f"{why} or their type: model.dtype={self.settings.model.dtype.value}. Nothing was trained.")

    def on_step_end(self, args, state, control, **kwargs):
        clock, loop = self.clock, self.loop
        self.steps += 1
        if self.steps == 2:
            warm_cache.freeze()
        if self.steps == FIRST:
            self.settled = clock.now
        if self.steps == 10 and (left := state.max_steps - state.global_step) > 0:
            a_step = (clock.now - self.settled) / (10 - FIRST)
            log.info("step %4d   about %s of training left", state.global_step, duration(left * a_step))
        # From start to start: a GPU computes a step while the next one is already prepared.
        loop.budget.note("step", clock.now - self.step_ended)
        self.step_ended = clock.now
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True
        every = steps_between(self.settings.samples.every_steps, state.max_steps)
        if state.global_step % every == 0 and state.global_step < state.max_steps:
            loop.end.due.append("samples")

    def on_train_end(self, args, state, control, **kwargs):
        trainer, clock, final = self.trainer, self.clock, self.recorder.final
        trainer.write_line()
        clock.stop()
        if not warm_cache.keeps_captured_steps(self.settings):
            cuda_graphs.forget_graphs(trainer.model)
        final["bad_steps"] = trainer.nonfinite.count
        if trainer.nonfinite.rose_at is not None:
            final["loss_rose_at"] = trainer.nonfinite.rose_at
        if trainer.nonfinite.still_at is not None:
            final["nothing_learnt_at"] = trainer.nonfinite.still_at
        if trainer.oom_retry.rows:  # a micro-batch ran out of memory
            final["rows_at_once"] = trainer.oom_retry.rows
        final["steps"], final["epochs"] = state.global_step, self.epochs(state)
        allocated = peak_allocated_gib()
        if allocated:
            final["memory_allocated_gib"] = allocated
        tokens = group.total(trainer.tokens_seen)
        if clock.seconds:
            final["tokens_per_second"] = round(int(tokens) / clock.seconds, 1)

    def epochs(self, state: Any) -> float:
        """Epochs so far."""
        trainer = self.trainer
        rows, at_once = trainer.epoch_rows or len(trainer.nonfinite.rows), trainer.args.per_device_train_batch_size
        return round(samplers.epochs_done(state.epoch or 0.0, rows, at_once), 4)


def run_callback(trainer: Any) -> Any:
    """The callback by which a trainer's run is logged and timed."""
    from transformers import TrainerCallback

    class RunCallback(RunEvents, TrainerCallback):
        pass

    return RunCallback(trainer)


def progress_bar() -> Any:
    from transformers import ProgressCallback

    class ProgressBar(ProgressCallback):
        """transformers' bar with the loss beside it, in place of a line of raw numbers a step."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}")

    return ProgressBar()
