"""What happens at the end of a step and of an evaluation, and the progress bar."""

import logging
import math
from typing import Any

from sft.config.method import METHODS
from sft.config.schedule import steps_between
from sft.config.schema import Settings
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


def run_callback(trainer, settings: Settings) -> Any:
    from transformers import TrainerCallback

    loop, clock, recorder = trainer.loop, trainer.loop.clock, trainer.loop.recorder
    method = METHODS[settings.method.name.value]

    def epochs(state: Any) -> float:
        rows, at_once = trainer.epoch_rows or len(trainer.nonfinite.rows), trainer.args.per_device_train_batch_size
        return round(samplers.epochs_done(state.epoch or 0.0, rows, at_once), 4)

    class RunCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            strategy.spread_random_state(settings.seed)
            trainer.restore()
            self.step_ended, self.steps = clock.seconds, 0

        def on_prediction_step(self, args, state, control, **kwargs):
            loop.stop.check()

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:  # after their held-out loss
                with loop.budget.measured("samples"):
                    loop.sample_writer.take(0)
            clock.start()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not writes_late(args.device):
                clock.lap()
            line = {"step": state.global_step, "epoch": epochs(state)}
            line |= {k: logs[k] for k in ("loss", "eval_loss", "learning_rate", "grad_norm") if k in logs}
            line |= {k: round(logs[k], 6) for k in logs if k.removeprefix("eval_") in trainer.shown}
            if "loss" in logs:
                loop.stop.failure = loop.stop.failure or trainer.nonfinite.settle(state.global_step)
                if trainer.nonfinite.count:
                    line["bad_steps"] = trainer.nonfinite.count
                trainer.nonfinite.watch(state.global_step, logs["loss"], logs.get("grad_norm"))
                if trainer.oom_retry.rows:
                    line["rows_at_once"] = trainer.oom_retry.rows
                seen, peaks = zip(*group.gathered((trainer.tokens_logged, peak_memory_gib())), strict=True)
                tokens, seconds = sum(seen), clock.seconds
                line["tokens"] = tokens
                since = max(seconds - clock.logged["seconds"], 1e-9)
                line["tokens_per_second"] = round((tokens - clock.logged["tokens"]) / since, 1)
                line["memory_gib"] = max(peaks)
                clock.logged = {"tokens": tokens, "seconds": seconds}
            if method.metric in logs:
                others = [f"eval_{name}" for name in trainer.shown[:2] if f"eval_{name}" != method.metric]
                more = "".join(f", {name.removeprefix('eval_')} {logs[name]:.3f}" for name in others)
                log.info("step %4d   %s %.4f%s", state.global_step, method.title, logs[method.metric], more)
                if state.global_step == 0 and not math.isfinite(logs[method.metric]):
                    why = f"The model's {method.title} before the first step is not a finite number. Its weights are the cause,"
                    raise ModelFault(f"{why} or their type: model.dtype={settings.model.dtype.value}. Nothing was trained.")
            if "loss" in logs or method.metric in logs:
                recorder.add(line)

        def on_step_end(self, args, state, control, **kwargs):
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
            if state.global_step >= state.max_steps and trainer.eval_dataset is not None:
                control.should_evaluate = True
            every = steps_between(settings.samples.every_steps, state.max_steps)
            if state.global_step % every == 0 and state.global_step < state.max_steps:
                loop.end.due.append("samples")

        def on_train_end(self, args, state, control, **kwargs):
            trainer.write_line()
            clock.stop()
            if not warm_cache.keeps_captured_steps(settings):
                cuda_graphs.forget_graphs(trainer.model)
            recorder.final["bad_steps"] = trainer.nonfinite.count
            if trainer.nonfinite.rose_at is not None:
                recorder.final["loss_rose_at"] = trainer.nonfinite.rose_at
            if trainer.nonfinite.still_at is not None:
                recorder.final["nothing_learnt_at"] = trainer.nonfinite.still_at
            if trainer.oom_retry.rows:  # a micro-batch ran out of memory
                recorder.final["rows_at_once"] = trainer.oom_retry.rows
            recorder.final["steps"], recorder.final["epochs"] = state.global_step, epochs(state)
            allocated = peak_allocated_gib()
            if allocated:
                recorder.final["memory_allocated_gib"] = allocated
            tokens = group.total(trainer.tokens_seen)
            if clock.seconds:
                recorder.final["tokens_per_second"] = round(int(tokens) / clock.seconds, 1)

    return RunCallback()


def progress_bar() -> Any:
    from transformers import ProgressCallback

    class ProgressBar(ProgressCallback):
        """transformers' bar with the loss beside it, in place of a line of raw numbers a step."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}")

    return ProgressBar()
