"""Supervised fine-tuning: TRL's SFTTrainer over our tokens, evaluated to the mean over target tokens."""

import logging
from dataclasses import replace
from typing import Any

from sft.config.lora_rules import LORAPLUS
from sft.config.method import SFT
from sft.config.schema import Settings
from sft.data import collators
from sft.data.token_cache import token_counts
from sft.distributed import group, strategy
from sft.export import measure
from sft.methods.answers import token_log_probs
from sft.methods.arguments import training_arguments
from sft.model import warm_cache
from sft.model.structure import base_of
from sft.storage.jsonio import read_lines
from sft.training import acceleration, held_out_rows, metrics, samplers
from sft.training.callbacks import progress_bar, run_callback
from sft.training.context import RunContext
from sft.training.nonfinite import NonFiniteSteps
from sft.training.oom import OomRetry
from sft.training.trainer import Loop, ResumableTrainer

log = logging.getLogger(__name__)


class SftSteps(ResumableTrainer):
    """Put before TRL's trainer as a base, it counts the non-padding tokens that are trained on, and evaluates to the mean over
    tokens.

    Counts and sums stay on the device until they are read. transformers' own evaluation loss is a mean over
    batches, which changes with the size of a batch: two runs could not be ranked by it.
    """

    batch_rows: Any = None
    """`sum_by_row` of the padding-free batch that was evaluated last."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.tokens_seen = self.tokens_seen + metrics.count_tokens(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not collators.is_padding_free(inputs):
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        if not model.training:
            found = token_log_probs(model, inputs)
            self.batch_rows = held_out_rows.sum_by_row(found, inputs)
            return (-found.mean(), {}) if return_outputs else -found.mean()
        import transformers

        # Past TRL's own, which waits for the GPU three times a micro-batch to count what is never shown.
        return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, **kwargs)

    def floating_point_ops(self, inputs):
        return 0  # a walk over all weights at every micro-batch, for a number that nothing reads

    def get_eval_dataloader(self, *args, **kwargs):
        usual = self.data_collator
        self.data_collator = self.padding_free_collator or usual
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = usual

    def prediction_step(self, model, inputs, *args, **kwargs):
        import torch

        usual = super().prediction_step

        def predict(batch):
            return usual(model, batch, *args, **kwargs)[0], self.batch_rows

        results = self.oom_retry.evaluate(predict, inputs)
        for (loss, _), targets in results:
            loss = torch.where(targets > 0, loss.double(), 0.0)  # a micro-batch of fillers alone has no mean
            self.eval_sum, self.eval_tokens = self.eval_sum + loss * targets, self.eval_tokens + targets
        if self.plan.padding_free:
            self.eval_rows.append(torch.cat([rows for (_, rows), _ in results]))
        return results[0][0][0], None, None

    def evaluation_loop(self, *args, **kwargs):
        found = self.evaluate_once(*args, **kwargs)
        if rows := found.predictions:
            losses, targets = [total / count for total, count in rows], [int(count) for _, count in rows]
            held_out_rows.write_losses(self.loop.folder, self.state.global_step, losses, targets)
        return found

    def evaluate_once(self, *args, **kwargs):
        if self.state.global_step:
            return self.evaluate_anew(*args, **kwargs)
        settings = self.ctx.settings
        what = [
            self.ctx.prepared.facts["held_out_hash"],
            self.args.per_device_eval_batch_size,
            self.plan.padding_free,
            settings.trainer.extra,
        ]
        found = warm_cache.of_base("evaluation", self.model, settings, what, lambda: self.evaluate_anew(*args, **kwargs))
        return found._replace(metrics=dict(found.metrics))

    def evaluate_anew(self, *args, metric_key_prefix="eval", **kwargs):
        self.eval_sum, self.eval_tokens, self.eval_rows = 0.0, 0, []
        across, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:  # each process takes the mean of its own rows
            with acceleration.evaluating(self.model, self.plan):
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.args.average_tokens_across_devices = across
        mean = group.total(self.eval_sum) / group.total(self.eval_tokens)
        output.metrics[f"{metric_key_prefix}_loss"] = mean
        rows = held_out_rows.gather_rows(self.eval_rows)
        if not self.plan.padding_free and not self.state.global_step:  # those of the kept weights follow from `held_out_loss`
            rows = _row_sums(self.ctx, self)
        return output._replace(predictions=rows)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if ratio := self.ctx.settings.lora.extra.get(LORAPLUS):
            _raise_rate_of_b(optimizer, self.model, ratio)
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        sampler, rows = super()._get_train_sampler(train_dataset), self.args.per_device_train_batch_size
        data, micro_batches = self.ctx.prepared.train, self.ctx.settings.trainer.gradient_accumulation_steps
        if not self.plan.padding_free:
            return samplers.share_rows(sampler, len(data), rows)
        return samplers.balance_steps(sampler, token_counts(data).tolist(), rows, micro_batches, filler=1)

    def _get_eval_sampler(self, eval_dataset):
        from torch.utils.data import SequentialSampler

        sampler, rows = super()._get_eval_sampler(eval_dataset), len(self.ctx.prepared.eval)
        if self.plan.padding_free:
            sampler = SequentialSampler(range(rows))  # eval_rows.jsonl has them in their order
        return samplers.share_rows(sampler, rows, self.args.per_device_eval_batch_size)


def build_trainer(ctx: RunContext, model: Any, loop: Loop) -> Any:
    """An SFTTrainer for `ctx.prepared`, which is tokenised and masked; it goes on from `loop.checkpoint` if there is one.

    Samples are taken before the first step and at those that `samples.every_steps` names, but not after the last one: those
    belong to the caller, who knows which weights are kept.
    """
    from trl import SFTTrainer  # which Unsloth has replaced by now, where it loaded the model

    class Trainer(SftSteps, SFTTrainer):
        pass

    settings, data, tokenizer = ctx.settings, ctx.prepared, ctx.tokenizer
    plan = acceleration.settle(model, settings, data, tokenizer.pad_token_id, ctx.plan)
    longest = int(max(token_counts(split).max() for split in (data.train, data.eval) if split is not None))
    args = training_arguments(settings, loop.folder, data.eval is not None, plan, _takes_chunks(model, settings))
    strategy.settle_device(args)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=_model_columns(data.train, tokenizer, settings),
        eval_dataset=_model_columns(data.eval, tokenizer, settings) if data.eval is not None else None,
        processing_class=tokenizer,
    )
    strategy.settle_accelerator(trainer.accelerator, trainer.model)
    trainer.plan, trainer.padding_free_collator = plan, None
    if plan.padding_free:
        rows = settings.trainer.per_device_train_batch_size if plan.capture_sizes else 0
        # Evaluation is not captured.
        trainer.padding_free_collator = collators.PaddingFreeCollator(tokenizer.pad_token_id, longest)
        trainer.data_collator = replace(trainer.padding_free_collator, lengths=plan.capture_sizes, rows=rows)
    watch(trainer, ctx, loop)
    return trainer


def watch(trainer: Any, ctx: RunContext, loop: Loop) -> None:
    """Give a trainer what watches its steps: the run's loop, its callbacks, non-finite steps, micro-batches that do not fit."""
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

    settings = ctx.settings
    trainer.ctx, trainer.loop = ctx, loop
    trainer.nonfinite = NonFiniteSteps(trainer, ctx.prepared.train, settings.trainer.max_bad_steps)
    trainer.oom_retry = OomRetry(trainer)
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(run_callback(trainer))
    trainer.add_callback(progress_bar())
    patience = settings.trainer.early_stopping_patience
    if patience:
        trainer.add_callback(EarlyStoppingCallback(patience, settings.trainer.early_stopping_threshold))


def _raise_rate_of_b(optimizer: Any, model: Any, ratio: float) -> None:
    """Give the B matrices of the adapter groups of their own in the optimiser, with `ratio` times the learning rate (LoRA+).
    The schedule multiplies each group's own rate."""
    of_b = {id(p) for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B" in name}
    for part in list(optimizer.param_groups):
        raised = [p for p in part["params"] if id(p) in of_b]
        if raised:
            part["params"] = [p for p in part["params"] if id(p) not in of_b]
            optimizer.add_param_group({**part, "params": raised, "lr": ratio * part["lr"]})


def held_out_loss(ctx: RunContext, trainer: Any) -> float:
    """The mean loss of the rows of held_out.jsonl by the weights in memory."""
    if (known := _just_evaluated(ctx, trainer)) is not None:
        return known
    if trainer.padding_free_collator or ctx.prepared.eval is None:
        return mean_loss(ctx, trainer)
    sums, counts = zip(*_row_sums(ctx, trainer), strict=True)
    losses = [total / count for total, count in zip(sums, counts, strict=True)]
    held_out_rows.write_losses(ctx.folder, ctx.recorder.final["kept_step"], losses, list(counts))
    return sum(sums) / sum(counts)


def _just_evaluated(ctx: RunContext, trainer: Any) -> float | None:
    """The same, from what the last evaluation found of each row, where it was of the weights that are in memory."""
    last = next(reversed(read_lines(ctx.folder / "eval_rows.jsonl")), {})
    counts = [row.targets[0] for row in measure.read_rows(ctx.folder)]
    losses, targets = ([*(last.get(name) or [])][: len(counts)] for name in ("losses", "targets"))
    of_memory = last.get("step") == trainer.state.global_step == ctx.recorder.final["kept_step"]
    if not of_memory or ctx.prepared.eval is None or targets != counts or None in losses:
        return None
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def mean_loss(ctx: RunContext, trainer: Any) -> float:
    """The same, which nothing is written of."""
    model, collate, rows = trainer.model, trainer.padding_free_collator, measure.read_rows(ctx.folder)
    with trainer.compute_loss_context_manager(), acceleration.evaluating(model, trainer.plan):
        return measure.padding_free_loss(model, rows, collate) if collate else measure.row_losses(model, rows)[0]


def _row_sums(ctx: RunContext, trainer: Any) -> list[tuple[float, int]]:
    """(summed loss, target tokens) of each row of held_out.jsonl: a padded batch has but one loss for all of its rows."""
    rows = measure.read_rows(ctx.folder)
    with trainer.compute_loss_context_manager(), acceleration.evaluating(trainer.model, trainer.plan):
        losses = measure.row_losses(trainer.model, rows)[1]
    return [(loss * row.targets[0], row.targets[0]) for loss, row in zip(losses, rows, strict=True)]


def _takes_chunks(model: Any, settings: Settings) -> bool:
    """Whether TRL's default loss, `chunked_nll`, computes what the model does: it multiplies by the output layer's own weight,
    past an adapter on it and past a scale of the logits (Granite's), and has no logits to smooth labels with.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    base = base_of(model)
    scaled = getattr(base.config.get_text_config(), "logits_scaling", 1) != 1
    smoothed = bool(settings.trainer.extra.get("label_smoothing_factor"))
    return not (isinstance(base.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper) or scaled or smoothed)


def _model_columns(dataset: Any, tokenizer: Any, settings: Settings) -> Any:
    columns = samplers.with_filler(dataset.select_columns(list(SFT.columns)), tokenizer.pad_token_id)
    # No row is longer: sft.data saw to it. Unsloth asks for this word before it makes batches padding-free.
    columns._unsloth_truncated_to = settings.model.max_seq_length
    return columns
