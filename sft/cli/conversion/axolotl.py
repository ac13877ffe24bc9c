"""Axolotl's configs."""

import re
from pathlib import Path
from typing import Any

from sft.cli.conversion.carried import (
    METHOD,
    UPSTREAM,
    Conversion,
    carry_chat_template,
    carry_modules,
    carry_per_epoch,
    carry_seed,
    carry_special_tokens,
    carry_tracker,
    carry_train_on_prompt,
    carry_val_size,
    mark_defaults,
    no_method,
    put_rows,
    take,
)

AXOLOTL_DEFAULTS = {
    "sequence_len": 512, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1, "lr_scheduler": "cosine",
    "optimizer": "adamw_torch", "weight_decay": 0.0, "val_set_size": 0.0, "seed": 42,
}  # fmt: skip

AXOLOTL = {
    "base_model": "model.name", "revision_of_model": "model.revision", "load_in_4bit": "model.load_in_4bit",
    "load_in_8bit": "model.load_in_8bit", "sequence_len": "model.max_seq_length", "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha", "lora_dropout": "lora.lora_dropout", "lora_modules_to_save": "lora.modules_to_save",
    "lora_model_dir": "lora.start_from", "peft_use_rslora": "lora.use_rslora", "peft_use_dora": "lora.use_dora",
    "loraplus_lr_ratio": "lora.extra.loraplus_lr_ratio", "peft_layers_to_transform": "lora.extra.layers_to_transform",
    "micro_batch_size": "trainer.per_device_train_batch_size", "eval_batch_size": "trainer.per_device_eval_batch_size",
    "num_epochs": "trainer.num_train_epochs", "lr_scheduler": "trainer.lr_scheduler_type", "optimizer": "trainer.optim",
    "wandb_project": "tracking.project", "wandb_entity": "tracking.entity",
    "swanlab_project": "tracking.project", "swanlab_experiment_name": "tracking.name",
    "wandb_name": "tracking.name", "default_system_message": "dataset.system_prompt",
    "rl_beta": "method.beta", "dpo_beta": "method.beta", "dpo_label_smoothing": "method.label_smoothing",
    "chat_template_jinja": "model.chat_template", "max_grad_norm": "trainer.max_grad_norm",
}  # fmt: skip

AXOLOTL_PAIRS = {
    "intel": ("question", "chosen", "rejected"),
    "argilla": ("instruction", "chosen_response", "rejected_response"),
    "icr": ("input", "chosen", "rejected"),
    "ultra": ("prompt", "chosen", "rejected"),
    "prompt_pairs": ("prompt", "chosen", "rejected"),
}
"""Columns of the prompt and of its two answers by the last word of a type, as `chatml.intel`."""


def convert_axolotl(plain: dict[str, Any], path: Path) -> Conversion:
    """An Axolotl YAML."""
    made = Conversion("an Axolotl config", path.parent)
    given = AXOLOTL_DEFAULTS | plain
    if not (plain.get("warmup_steps") or plain.get("warmup_ratio")):
        made.put("trainer.warmup_steps", 0.03, "warmup_steps, its default")
        given.pop("warmup_steps", None), given.pop("warmup_ratio", None)
    take(made, given, AXOLOTL, UPSTREAM | {
        "adapter": _axolotl_adapter, "rl": _axolotl_rl, "datasets": _axolotl_datasets, "test_datasets": _axolotl_tests,
        "lora_target_modules": carry_modules, "lora_target_linear": _axolotl_linear, "train_on_inputs": carry_train_on_prompt,
        "chat_template": carry_chat_template, "saves_per_epoch": carry_per_epoch("save_steps"),
        "evals_per_epoch": carry_per_epoch("eval_steps"), "trl": _axolotl_trl, "seed": carry_seed,
        "val_set_size": carry_val_size, "special_tokens": carry_special_tokens,
        "excess_length_strategy": _excess, "use_wandb": carry_tracker, "use_mlflow": carry_tracker,
        "use_tensorboard": carry_tracker, "use_swanlab": carry_tracker, "eot_tokens": carry_special_tokens,
    })  # fmt: skip
    made.values.setdefault("dataset.loss_on", "answer")
    if "dataset.overlong" not in made.values:
        made.put("dataset.overlong", "drop", "excess_length_strategy, its default")
    mark_defaults(made, AXOLOTL_DEFAULTS, plain)
    if "tracking" not in made.choices:
        made.choose("tracking", "wandb" if plain.get("wandb_project") else "none")
    return made


def _axolotl_adapter(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value == "qlora":
        made.put("model.load_in_4bit", True, key)
    elif not value:
        made.choose("lora", "none")
        made.needless[key] = "lora=none trains every weight"
    elif value == "lora":
        made.needless[key] = "an adapter is what is trained"
    else:
        made.left[key] = "adapters here are LoRA"


def _axolotl_rl(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value in ("dpo", "ipo", "grpo"):
        made.choose("method", "grpo" if value == "grpo" else "dpo")
        made.needless[key] = f"method={made.choices['method']}"
        if value == "ipo":
            made.put("method.loss_type", "ipo", key)
    elif value:
        no_method(made, key, value)
    else:
        made.needless[key] = "it is not set"


def _axolotl_linear(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value and not given.get("lora_target_modules"):
        made.put("lora.target_modules", ["all-linear"], key)
    else:
        made.needless[key] = "lora_target_modules names the layers" if value else "it is off"


def _excess(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.put("dataset.overlong", "truncate" if value == "truncate" else "drop", key)


def _axolotl_trl(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    for name, inner in (value or {}).items():
        if name in METHOD - {"reward_funcs"}:
            made.put(f"method.{name}", inner, f"trl.{name}")
        elif name == "reward_funcs":
            made.left["trl.reward_funcs"] = "code; put the functions into a file: 'method.reward_funcs=[rewards.py:<function>]'"
        else:
            made.left[f"trl.{name}"] = "there is no such setting here"


def _axolotl_tests(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    if first.get("path") == (given.get("datasets") or [{}])[0].get("path") and first.get("split"):
        made.put("dataset.eval_split", first["split"], key)
        made.put("dataset.eval_fraction", 0.0, key)
    elif first.get("path"):
        put_rows(made, str(first["path"]), key, key="eval_path")
    else:
        made.needless[key] = "it is not set"


def _axolotl_datasets(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    entries = [one for one in value or [] if isinstance(one, dict) and one.get("path")]
    if not entries:
        return
    for number, other in enumerate(entries[1:], 2):
        made.left[f"datasets[{number}]: {other['path']}"] = (
            "one data set is trained on; files go together: 'dataset.path=[a.jsonl,b.jsonl]'"
        )
    entry = dict(entries[0])
    files = entry.pop("data_files", None)
    place = str((files[0] if isinstance(files, list) else files) or entry["path"])
    put_rows(made, place, "datasets.path", str(entry.pop("split", "train")))
    pairs = given.get("rl") in ("dpo", "ipo")
    for name, inner in entry.items():
        source = f"datasets.{name}"
        if name in ("path", "ds_type") or not inner:
            continue
        if name == "type":
            _axolotl_type(made, inner, source, pairs)
        elif name in AXOLOTL_FIELDS:
            made.put(AXOLOTL_FIELDS[name], inner, source)
        elif name in ("name", "revision"):
            made.put("dataset.config_name" if name == "name" else "dataset.revision", inner, source)
        elif name in ("message_property_mappings", "message_field_role", "message_field_content", "roles"):
            made.needless[source] = "turns are read by either of their usual keys: role and content, from and value"
        elif name == "roles_to_train" and inner == ["assistant"]:
            made.needless[source] = "the assistant's turns are what is trained on"
        elif name == "train_on_eos":
            made.needless[source] = "each answer is trained on with its end mark"
        elif name == "chat_template":
            carry_chat_template(made, source, inner, given)
        else:
            made.left[source] = "there is no such setting here"


AXOLOTL_FIELDS = {
    "field_messages": "dataset.columns.messages", "field_tools": "dataset.columns.tools", "field": "dataset.columns.text",
    "field_instruction": "dataset.columns.instruction", "field_output": "dataset.columns.output",
    "field_input": "dataset.columns.input", "field_system": "dataset.columns.system", "field_prompt": "dataset.columns.prompt",
    "field_chosen": "dataset.columns.chosen", "field_rejected": "dataset.columns.rejected",
}  # fmt: skip


def _axolotl_type(made: Conversion, kind: Any, source: str, pairs: bool) -> None:
    if isinstance(kind, dict):
        for name, inner in kind.items():
            if name in AXOLOTL_FIELDS and inner:
                made.put(AXOLOTL_FIELDS[name], inner, f"{source}.{name}")
            elif inner:
                made.left[f"{source}.{name}"] = (
                    "'dataset.template=\"...\"' takes a text with {instruction}, {input} and {output}"
                )
        return
    first, last = re.split(r"[.:]", str(kind))[0], re.split(r"[.:]", str(kind))[-1]
    if pairs:
        if last in AXOLOTL_PAIRS:
            for role, column in zip(("prompt", "chosen", "rejected"), AXOLOTL_PAIRS[last], strict=True):
                made.put(f"dataset.columns.{role}", column, source)
        else:
            made.needless[source] = "the columns of a pair are found by their names"
    elif first.startswith("alpaca"):
        made.put("dataset.template", "alpaca", source)
    elif first in ("chat_template", "sharegpt", "chatml"):
        made.put("dataset.template", "chat", source)
    elif first == "completion":
        made.put("dataset.shape", "text", source)
    else:
        made.left[source] = "columns are found by their names; the preview shows the text"
