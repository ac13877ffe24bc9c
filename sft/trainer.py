"""TRL's SFTTrainer over our tokens, and the one callback that records, samples and stops."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import distributed, fast, flat, shared, shares, strategy
from sft.bad_steps import BadSteps
from sft.batch import EVAL_ROWS, EvenPasses, eval_rows, planned_steps
from sft.data import Prepared, token_counts
from sft.errors import ModelFault
from sft.looks import steps_between
from sft.loop import Loop, resumable, writes_late
from sft.lora import base_of
from sft.models import torch_dtype, uses_checkpointing
from sft.runtime import append_jsonl, peak_allocated_gib, peak_memory_gib
from sft.settings import Settings
from sft.smaller_passes import SmallerPasses
from sft.speeds import duration
from sft.tracking import Tracking
from sft.validate import resolve_backend

log = logging.getLogger(__name__)

FIRST = 3
"""Steps that say nothing of the others: layers are compiled and passes recorded in them."""


class Recorder:
    """Keeps metrics.jsonl and the final numbers, and passes each line on to the tracker."""

    def __init__(self, folder: Path, tracking: Tracking):
        self.path, self.tracking = folder / "metrics.jsonl", tracking
        self.writes = distributed.is_first()
        self.final: dict[str, Any] = {}
        self.eval_step: int | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, for `restore`."""
        return {"final": self.final, "eval_step": self.eval_step}

    def restore(self, kept: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.final, self.eval_step = kept["final"], kept["eval_step"]

    def add(self, metrics: dict[str, Any]) -> None:
        """Write one line of metrics."""
        if self.writes:
            append_jsonl(self.path, metrics)
            self.tracking.log(metrics)
        self.final |= {k: v for k, v in metrics.items() if k in ("loss", "eval_loss", "tokens", "memory_gib")}
        if "eval_loss" in metrics:
            self.eval_step = metrics["step"]
            self.final.setdefault("eval_loss_start", metrics["eval_loss"])


def build_trainer(
    model: Any,
    tokenizer: Any,
    data: Prepared,
    settings: Settings,
    loop: Loop,
    backend: str,
) -> Any:
    """An SFTTrainer for `data`, which is already tokenised and masked; it goes on from `loop.checkpoint` if there is one.

    `loop.answers` are taken before the first step and at those that `samples.every_steps` names, but not after the last one:
    those belong to the caller, who knows which weights are kept.
    """
    import torch
    import transformers
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    choice = fast.choose(
        model, settings, data, tokenizer.pad_token_id, backend, planned_steps(settings.trainer, len(data.train))
    )

    class Trainer(resumable(SFTTrainer)):
        """Counts the non-padding tokens it trains on, and evaluates to the mean over tokens.

        Counts and sums stay on the device until they are asked for. transformers' own evaluation loss is a mean over
        batches, which changes with the size of a batch: two runs could not be ranked by it.
        """

        def training_step(self, model, inputs, *args, **kwargs):
            self.tokens_seen = self.tokens_seen + flat.count_tokens(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            if not flat.is_flat(inputs):
                return super().compute_loss(model, inputs, *args, **kwargs)
            # Past TRL's own, which waits for the GPU three times a pass to count what is never shown.
            return transformers.Trainer.compute_loss(self, model, inputs, *args, **kwargs)

        def floating_point_ops(self, inputs):
            return 0  # a walk over all weights at every pass, for a number that nothing reads

        def get_eval_dataloader(self, *args, **kwargs):
            usual = self.data_collator
            self.data_collator = self.end_to_end or usual
            try:
                return super().get_eval_dataloader(*args, **kwargs)
            finally:
                self.data_collator = usual

        def prediction_step(self, model, inputs, *args, **kwargs):
            predict = super().prediction_step
            results = self.smaller.evaluate(lambda batch: predict(model, batch, *args, **kwargs)[0], inputs)
            for loss, learnt in results:
                loss = torch.where(learnt > 0, loss.double(), 0.0)  # a pass of fillers alone has no mean
                self.eval_sum, self.eval_tokens = self.eval_sum + loss * learnt, self.eval_tokens + learnt
            return results[0][0], None, None

        def evaluation_loop(self, *args, **kwargs):
            if self.state.global_step:
                return self.evaluate_anew(*args, **kwargs)
            what = [
                data.facts["held_out_hash"],
                self.args.per_device_eval_batch_size,
                choice.padding_free,
                settings.trainer.extra,
            ]
            found = shared.of_base("evaluation", self.model, settings, what, lambda: self.evaluate_anew(*args, **kwargs))
            return found._replace(metrics=dict(found.metrics))

        def evaluate_anew(self, *args, metric_key_prefix="eval", **kwargs):
            self.eval_sum, self.eval_tokens = 0.0, 0
            across, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
            try:  # each process takes the mean of its own rows
                with fast.evaluating(self.model, choice):
                    output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            finally:
                self.args.average_tokens_across_devices = across
            mean = distributed.total(self.eval_sum) / distributed.total(self.eval_tokens)
            output.metrics[f"{metric_key_prefix}_loss"] = mean
            return output

        def _get_train_sampler(self, train_dataset=None):
            sampler, rows = super()._get_train_sampler(train_dataset), self.args.per_device_train_batch_size
            passes = settings.trainer.gradient_accumulation_steps
            if not choice.padding_free or passes == 1:
                return shares.share_rows(sampler, len(data.train), rows)
            ordered = shares.share_rows(shares.settle_order(sampler, len(data.train)), len(data.train), rows)
            lengths = [*token_counts(data.train).tolist(), 1]  # the last one is the filler's
            return EvenPasses(ordered, lengths, rows, passes)

        def _get_eval_sampler(self, eval_dataset):
            sampler = super()._get_eval_sampler(eval_dataset)
            return shares.share_rows(sampler, len(data.eval), self.args.per_device_eval_batch_size)

    longest = int(max(token_counts(split).max() for split in (data.train, data.eval) if split is not None))
    many = choice.padding_free and torch.cuda.is_available() and data.eval is not None
    rows = eval_rows(settings.trainer, token_counts(data.eval) if many else None, distributed.world_size())
    args = training_arguments(settings, loop.folder, data.eval is not None, choice, rows, _takes_chunks(model, settings))
    strategy.settle_device(args)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=_model_columns(data.train, tokenizer, settings),
        eval_dataset=_model_columns(data.eval, tokenizer, settings) if data.eval is not None else None,
        processing_class=tokenizer,
    )
    strategy.settle_accelerator(trainer.accelerator)
    trainer.fast, trainer.end_to_end = choice, None
    if choice.padding_free:
        rows = settings.trainer.per_device_train_batch_size if choice.lengths else 0
        trainer.end_to_end = flat.EndToEnd(tokenizer.pad_token_id, longest)  # evaluation is not recorded
        trainer.data_collator = replace(trainer.end_to_end, lengths=choice.lengths, rows=rows)
    trainer.loop = loop
    trainer.bad_steps = BadSteps(trainer, data.train, settings.trainer.max_bad_steps)
    trainer.smaller = SmallerPasses(trainer)
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(_run_callback(trainer, settings))
    trainer.add_callback(_progress_bar())
    patience = settings.trainer.early_stopping_patience
    if patience:
        trainer.add_callback(EarlyStoppingCallback(patience, settings.trainer.early_stopping_threshold))
    return trainer


def _takes_chunks(model: Any, settings: Settings) -> bool:
    """Whether TRL's default loss, `chunked_nll`, computes what the model does: it multiplies by the output layer's own weight,
    past an adapter on it and past a scale of the logits (Granite's), and has no logits to smooth labels with.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_of(model)
    scaled = getattr(base.config.get_text_config(), "logits_scaling", 1) != 1
    smoothed = bool(settings.trainer.extra.get("label_smoothing_factor"))
    return not (isinstance(base.get_output_embeddings(), BaseTunerLayer) or scaled or smoothed)


def training_arguments(
    settings: Settings, folder: Path, has_eval: bool, choice: fast.Fast, rows: int = EVAL_ROWS, chunked: bool = True
) -> Any:
    """The SFTConfig of these settings; every value is plain, none is a config node. An evaluation's pass has `rows` rows;
    `chunked` says whether padded rows can have TRL's default loss.
    """
    import torch
    from trl import SFTConfig

    t, gpu = settings.trainer, torch.cuda.is_available()
    dtype = torch_dtype(settings.model)
    keep_best = has_eval and (t.load_best_model_at_end or bool(t.early_stopping_patience))
    options = dict(
        output_dir=str(folder / "checkpoints"),
        seed=settings.seed,
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=shares.passes_of_rank(t.gradient_accumulation_steps),
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_steps=t.warmup_steps,
        # The same optimiser in one kernel, which is told on the device to leave a bad step out; nothing waits for the GPU.
        optim="adamw_torch_fused" if gpu and t.optim == "adamw_torch" else t.optim,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        logging_steps=t.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not a number is shown, not smoothed away
        eval_strategy="steps" if has_eval else "no",
        eval_steps=t.eval_steps if has_eval else None,
        eval_on_start=has_eval,
        save_strategy="steps",
        save_steps=t.save_steps,
        metric_for_best_model="eval_loss" if has_eval else None,
        greater_is_better=False if has_eval else None,
        gradient_checkpointing=uses_checkpointing(settings),
        bf16=gpu and dtype == torch.bfloat16,
        fp16=gpu and dtype == torch.float16,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        accelerator_config={"non_blocking": gpu},  # else each pass would wait for the one before to be moved to the GPU
        max_length=settings.model.max_seq_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        # The head's loss of sft/flat.py needs no patch; else TRL's default, where it fits.
        **({"loss_type": "nll"} if choice.padding_free or not chunked else {}),
        # None lets Unsloth lay rows end to end, which its GPU kernels keep apart; everything else pads them.
        padding_free=None if gpu and resolve_backend(settings) == "unsloth" else False,
        remove_unused_columns=False,
        report_to="none",
    )
    args = SFTConfig(**(options | strategy.training_options(settings, uses_checkpointing(settings)) | t.extra))
    # Not among the options, which would then ask for checkpoints at evaluations alone: sft/loop.py saves each new best itself.
    args.load_best_model_at_end = keep_best
    return args


def _model_columns(dataset: Any, tokenizer: Any, settings: Settings) -> Any:
    columns = shares.with_filler(dataset.select_columns(["input_ids", "labels"]), tokenizer.pad_token_id)
    # No row is longer: sft.data saw to it. Unsloth asks for this word before it lays rows end to end without padding.
    columns._unsloth_truncated_to = settings.model.max_seq_length
    return columns


def _run_callback(trainer, settings: Settings) -> Any:
    from transformers import TrainerCallback

    loop, clock, recorder = trainer.loop, trainer.loop.clock, trainer.loop.recorder

    def epochs(state: Any) -> float:
        rows, at_once = len(trainer.bad_steps.rows), trainer.args.per_device_train_batch_size
        return round(shares.epochs_done(state.epoch or 0.0, rows, at_once), 4)

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
                    loop.answers.take(0)
            clock.start()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not writes_late(args.device):
                clock.lap()
            line = {"step": state.global_step, "epoch": epochs(state)}
            line |= {k: logs[k] for k in ("loss", "eval_loss", "learning_rate", "grad_norm") if k in logs}
            if "loss" in logs:
                loop.stop.failure = loop.stop.failure or trainer.bad_steps.settle(state.global_step)
                if trainer.bad_steps.count:
                    line["bad_steps"] = trainer.bad_steps.count
                trainer.bad_steps.watch(state.global_step, logs["loss"], logs.get("grad_norm"))
                if trainer.smaller.rows:
                    line["rows_at_once"] = trainer.smaller.rows
                seen, peaks = zip(*distributed.gathered((trainer.tokens_logged, peak_memory_gib())), strict=True)
                tokens, seconds = sum(seen), clock.seconds
                line["tokens"] = tokens
                since = max(seconds - clock.logged["seconds"], 1e-9)
                line["tokens_per_second"] = round((tokens - clock.logged["tokens"]) / since, 1)
                line["memory_gib"] = max(peaks)
                clock.logged = {"tokens": tokens, "seconds": seconds}
            if "eval_loss" in logs:
                log.info("step %4d   held-out loss %.4f", state.global_step, logs["eval_loss"])
                if state.global_step == 0 and not math.isfinite(logs["eval_loss"]):
                    why = (
                        "The model's held-out loss before the first step is not a finite number. Its weights are the cause, or"
                    )
                    raise ModelFault(f"{why} their type: model.dtype={settings.model.dtype.value}. Nothing was trained.")
            if "loss" in logs or "eval_loss" in logs:
                recorder.add(line)

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1
            if self.steps == 2:
                shared.freeze()
            if self.steps == FIRST:
                self.settled = clock.now
            if self.steps == 10 and (left := state.max_steps - state.global_step) > 0:
                a_step = (clock.now - self.settled) / (10 - FIRST)
                log.info("step %4d   about %s of training left", state.global_step, duration(left * a_step))
            # From end to end: a GPU computes a step while the next one is already prepared.
            loop.budget.note("step", clock.now - self.step_ended)
            self.step_ended = clock.now
            if state.global_step >= state.max_steps and trainer.eval_dataset is not None:
                control.should_evaluate = True
            every = steps_between(settings.samples.every_steps, state.max_steps)
            if state.global_step % every == 0 and state.global_step < state.max_steps:
                loop.due.append("samples")

        def on_train_end(self, args, state, control, **kwargs):
            trainer.write_line()
            clock.stop()
            if not shared.keeps_recordings(settings):
                fast.forget_graphs(trainer.model)
            recorder.final["bad_steps"] = trainer.bad_steps.count
            if trainer.bad_steps.rose_at is not None:
                recorder.final["loss_rose_at"] = trainer.bad_steps.rose_at
            if trainer.bad_steps.still_at is not None:
                recorder.final["nothing_learnt_at"] = trainer.bad_steps.still_at
            if trainer.smaller.rows:  # a pass ran out of memory
                recorder.final["rows_at_once"] = trainer.smaller.rows
            recorder.final["steps"], recorder.final["epochs"] = state.global_step, epochs(state)
            allocated = peak_allocated_gib()
            if allocated:
                recorder.final["memory_allocated_gib"] = allocated
            tokens = distributed.total(trainer.tokens_seen)
            if clock.seconds:
                recorder.final["tokens_per_second"] = round(int(tokens) / clock.seconds, 1)

    return RunCallback()


def _progress_bar() -> Any:
    from transformers import ProgressCallback

    class ProgressBar(ProgressCallback):
        """transformers' bar with the loss beside it, in place of a line of raw numbers a step."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}")

    return ProgressBar()
