"""TRL's training arguments from the settings."""

from pathlib import Path
from typing import Any

from sft.config.method import METHODS
from sft.config.schema import Settings
from sft.distributed import strategy
from sft.plan.plan import Plan
from sft.training import samplers


def training_arguments(
    settings: Settings,
    folder: Path,
    has_eval: bool,
    plan: Plan,
    chunked: bool = True,
) -> Any:
    """The SFTConfig of these settings; every value is plain, none is a config node. `chunked` says whether padded rows can have
    TRL's default loss.
    """
    import torch
    from trl import SFTConfig

    method, t, gpu = METHODS[settings.method.name.value], settings.trainer, torch.cuda.is_available()
    keep_best = has_eval and (t.load_best_model_at_end or bool(t.early_stopping_patience))
    options = dict(
        output_dir=str(folder / "checkpoints"),
        seed=settings.seed,
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=plan.eval_batch_size,
        gradient_accumulation_steps=samplers.micro_batches_of_rank(t.gradient_accumulation_steps),
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_steps=t.warmup_steps,
        # The same optimiser in one kernel, which skips a non-finite step by a flag on the device; nothing waits for the GPU.
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
        metric_for_best_model=method.metric if has_eval else None,
        greater_is_better=method.greater_is_better if has_eval else None,
        gradient_checkpointing=plan.checkpointing,
        bf16=gpu and plan.dtype == "bfloat16",
        fp16=gpu and plan.dtype == "float16",
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        accelerator_config={"non_blocking": gpu},  # else each micro-batch would wait until it is moved to the GPU
        max_length=settings.model.max_seq_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        # The head's loss of sft/model/padding_free.py needs no patch; else TRL's default, where it fits.
        **({"loss_type": "nll"} if plan.padding_free or not chunked else {}),
        # TRL would add the config's load balancing of experts to padded rows, in the held-out loss too, and to no others.
        router_aux_loss_coef=0.0,
        # None lets Unsloth make padding-free batches, whose rows its GPU kernels keep apart; everything else pads them.
        padding_free=None if gpu and plan.backend == "unsloth" else False,
        remove_unused_columns=False,
        report_to="none",
    )
    args = SFTConfig(**(options | strategy.training_options(settings, plan.checkpointing) | t.extra))
    # Not among the options, which would then ask for checkpoints at evaluations alone: training/trainer.py saves each new best.
    args.load_best_model_at_end = keep_best
    return args
