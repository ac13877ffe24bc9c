"""Rules for `trainer.extra`, the options of TRL's SFTConfig that have no setting of their own."""

import difflib
import importlib.util
from dataclasses import fields
from typing import Any

from sft.config.keys import shown, typed
from sft.config.method_rules import why_not_grpo
from sft.config.schema import MethodName, Settings, TrainerSettings
from sft.config.upstream import sft_config_options
from sft.errors import Problem

# SFTConfig options that another setting of ours decides; two ways to set one thing would let one be ignored.
DECIDED_ELSEWHERE = {
    "output_dir": "hydra.run.dir",
    "seed": "seed",
    "data_seed": "seed",
    "max_length": "model.max_seq_length",
    "report_to": "tracking",
    "run_name": "tracking.name",
    "project": "tracking.project",
    "assistant_only_loss": "dataset.loss_on",
    "completion_only_loss": "dataset.loss_on",
    "chat_template_path": "model.chat_template",
    "dataset_text_field": "dataset.columns.text",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "model_init_kwargs": "model",
    "eval_on_start": "dataset.eval_fraction",
    "do_eval": "dataset.eval_fraction",
    "eval_strategy": "trainer.eval_steps",
    "save_strategy": "trainer.save_steps",
    "logging_strategy": "trainer.logging_steps",
    "metric_for_best_model": "trainer.load_best_model_at_end",
    "greater_is_better": "trainer.load_best_model_at_end",
    "fsdp": "distributed.strategy",
    "fsdp_config": "distributed.strategy",
}

# SFTConfig options that cannot act on rows which are tokenised and masked before TRL sees them.
WITHOUT_EFFECT = {
    "resume_from_checkpoint", "packing", "eval_packing", "packing_strategy", "dataset_kwargs",
    "dataset_num_proc", "truncation_mode",
    "eos_token", "pad_token", "remove_unused_columns", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy",
    "hub_private_repo", "hub_always_push", "hub_revision", "include_num_input_tokens_seen", "shuffle_dataset",
}  # fmt: skip

# What options of earlier versions of transformers and TRL are called now; a `{value}` is what was given.
RENAMED = {
    "warmup_ratio": "trainer.warmup_steps={value}   a number below 1 is a share of the steps",
    "group_by_length": "trainer.extra.train_sampling_strategy=group_by_length",
    "evaluation_strategy": "trainer.eval_steps=0.25   says how often; dataset.eval_fraction=0 evaluates nothing",
    "max_seq_length": "model.max_seq_length={value}",
    "max_prompt_length": "model.max_seq_length={value}",
    "per_gpu_train_batch_size": "trainer.per_device_train_batch_size={value}",
    "per_gpu_eval_batch_size": "trainer.per_device_eval_batch_size={value}",
    "batch_size": "trainer.per_device_train_batch_size={value}",
    "adafactor": "trainer.optim=adafactor",
    "optimizer": "trainer.optim={value}",
    "lr": "trainer.learning_rate={value}",
    "lr_scheduler": "trainer.lr_scheduler_type={value}",
    "neftune_alpha": "trainer.extra.neftune_noise_alpha={value}",
    "use_liger": "trainer.extra.use_liger_kernel={value}",
    "no_cuda": "CUDA_VISIBLE_DEVICES= python train.py ...   trains on the CPU",
    "use_mps_device": "leave trainer.extra.use_mps_device out: the device is found by itself",
    "half_precision_backend": "model.dtype=auto",
    "fp16_backend": "model.dtype=auto",
    "fp16_opt_level": "model.dtype=auto",
    "torchdynamo": "leave trainer.extra.torchdynamo out: layers are compiled where that is faster",
    "jit_mode_eval": "leave trainer.extra.jit_mode_eval out",
    "use_ipex": "leave trainer.extra.use_ipex out",
    "past_index": "leave trainer.extra.past_index out",
    "mp_parameters": "leave trainer.extra.mp_parameters out",
    "ray_scope": "leave trainer.extra.ray_scope out",
    "tpu_num_cores": "leave trainer.extra.tpu_num_cores out",
    "tpu_metrics_debug": "leave trainer.extra.tpu_metrics_debug out",
    "save_safetensors": "leave trainer.extra.save_safetensors out: weights are saved as safetensors alone",
    "overwrite_output_dir": "hydra.run.dir=<a folder>   each run has a folder of its own",
    "logging_dir": "leave trainer.extra.logging_dir out: metrics.jsonl and tracking have the curves",
    "sharded_ddp": "distributed=fsdp",
    "fsdp_min_num_params": "distributed=fsdp",
    "fsdp_transformer_layer_cls_to_wrap": "distributed=fsdp",
    "dispatch_batches": "'trainer.extra.accelerator_config={{dispatch_batches: {value}}}'",
    "split_batches": "'trainer.extra.accelerator_config={{split_batches: {value}}}'",
    "include_inputs_for_metrics": "'trainer.extra.include_for_metrics=[inputs]'",
    "include_tokens_per_second": "leave trainer.extra.include_tokens_per_second out: tokens_per_second is measured anyway",
    "push_to_hub_model_id": "export=adapter export.hub.repo=<user>/{value}",
    "push_to_hub_organization": "export=adapter export.hub.repo={value}/<name>",
    "push_to_hub_token": "set HF_TOKEN in the environment, and export=adapter export.hub.repo=<user>/<name>",
    "dataset_batch_size": "leave trainer.extra.dataset_batch_size out: rows are tokenised before TRL sees them",
    "num_of_sequences": "leave trainer.extra.num_of_sequences out: rows are tokenised before TRL sees them",
    "chars_per_token": "leave trainer.extra.chars_per_token out: rows are tokenised before TRL sees them",
    "train_on_inputs": "dataset.loss_on=all   or dataset.loss_on=answer",
}


def check_extra(settings: Settings) -> list[Problem]:
    """Options of TRL in `trainer.extra` that it does not have, or that would be ignored."""
    extra, problems = settings.trainer.extra, []
    if not extra:
        return problems
    grpo = settings.method.name == MethodName.grpo
    known = sft_config_options()
    ours = {f.name for f in fields(TrainerSettings)}
    for name, value in extra.items():
        what = f"trainer.extra.{name}={shown(value)}"
        if name in ours:
            problems.append(Problem(what, "It has a setting of its own.", f"trainer.{name}={shown(value)}"))
        elif grpo and name != "name" and hasattr(settings.method, name):
            problems.append(Problem(what, "It has a setting of its own.", typed(f"method.{name}", value)))
        elif grpo and (why := why_not_grpo(name)):
            problems.append(Problem(f"method=grpo {what}", why, f"leave trainer.extra.{name} out"))
        elif name in DECIDED_ELSEWHERE:
            problems.append(Problem(what, "Another setting decides this.", f"set {DECIDED_ELSEWHERE[name]} instead"))
        elif name in WITHOUT_EFFECT:
            problems.append(
                Problem(
                    what,
                    "It would have no effect: rows are rendered, tokenised and masked before TRL sees them.",
                    f"leave trainer.extra.{name} out",
                )
            )
        elif known and name not in known:
            problems.append(_unknown_extra(name, value, known))
    return problems


def _unknown_extra(name: str, value: Any, known: set[str]) -> Problem:
    """The problem of an option that SFTConfig does not have: what it was renamed to, or was meant to be."""
    what, why = f"trainer.extra.{name}={shown(value)}", "TRL's SFTConfig has no such option."
    if name in RENAMED:
        fix = RENAMED[name].format(value=shown(value))
        return Problem(what, f"{why} It was renamed or taken out of transformers and TRL.", fix)
    ours = {f.name for f in fields(TrainerSettings)} - {"extra"}
    useful = sorted((known | ours) - set(DECIDED_ELSEWHERE) - WITHOUT_EFFECT)
    close = [k for k in useful if k.startswith(name)] + difflib.get_close_matches(name, useful, 1, 0.6)
    if not close:
        return Problem(what, why, "its options: https://huggingface.co/docs/trl/sft_trainer")
    key = f"trainer.{close[0]}" if close[0] in ours else f"trainer.extra.{close[0]}"
    return Problem(what, f"{why} Did you mean {close[0]}?", f"{key}={shown(value)}")


def check_loss(extra: dict[str, Any]) -> list[Problem]:
    """TRL's losses, and what does not fit together with one."""
    loss, liger, smoothing = (extra.get(name) for name in ("loss_type", "use_liger_kernel", "label_smoothing_factor"))
    named, problems = f"trainer.extra.loss_type={loss}", []
    losses = ("nll", "dft", "chunked_nll")
    if loss is not None and loss not in losses:
        close = difflib.get_close_matches(str(loss), losses, 1, 0.3) or losses
        problems.append(Problem(named, f"TRL's losses are {', '.join(losses)}.", f"trainer.extra.loss_type={close[0]}"))
    if liger and not importlib.util.find_spec("liger_kernel"):
        fix = "pip install liger-kernel   or leave trainer.extra.use_liger_kernel out"
        why = "It needs the package liger-kernel, which is not installed."
        problems.append(Problem("trainer.extra.use_liger_kernel=true", why, fix))
    if liger and loss == "chunked_nll":
        why = "Liger has a loss of its own that makes no logits, which stands in for this one."
        problems.append(Problem(f"trainer.extra.use_liger_kernel=true {named}", why, "leave trainer.extra.loss_type out"))
    if smoothing and (liger or loss in ("dft", "chunked_nll")):
        other = "trainer.extra.use_liger_kernel=true" if liger else named
        why = (
            "This loss makes no logits that labels could be smoothed in."
            if loss != "dft"
            else "It would be ignored by this loss."
        )
        fix = "leave trainer.extra.use_liger_kernel out" if liger else "trainer.extra.loss_type=nll"
        what = f"trainer.extra.label_smoothing_factor={smoothing} {other}"
        problems.append(Problem(what, why, f"{fix}   or leave trainer.extra.label_smoothing_factor out"))
    return problems
