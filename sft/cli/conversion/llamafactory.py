"""LLaMA-Factory's configs, with what dataset_info.json says of their data."""

import json
from pathlib import Path
from typing import Any

from sft.cli.conversion.carried import (
    TEMPLATE,
    UPSTREAM,
    Conversion,
    carry_list,
    carry_modules,
    carry_seed,
    carry_tracker,
    carry_train_on_prompt,
    carry_val_size,
    carry_warmup,
    mark_defaults,
    no_method,
    put_rows,
    take,
)

LLAMAFACTORY_DEFAULTS = {
    "stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "lora_dropout": 0.0, "lora_target": "all", "cutoff_len": 2048,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "val_size": 0.0, "seed": 42,
    "load_best_model_at_end": False,
}  # fmt: skip

LLAMAFACTORY = {
    "model_name_or_path": "model.name", "model_revision": "model.revision", "cutoff_len": "model.max_seq_length",
    "lora_rank": "lora.r", "lora_alpha": "lora.lora_alpha", "lora_dropout": "lora.lora_dropout",
    "additional_target": "lora.modules_to_save", "adapter_name_or_path": "lora.start_from", "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora", "loraplus_lr_ratio": "lora.extra.loraplus_lr_ratio", "max_samples": "dataset.max_rows",
    "default_system": "dataset.system_prompt", "pref_beta": "method.beta", "pref_ftx": "method.sft_weight",
    "dpo_label_smoothing": "method.label_smoothing", "run_name": "tracking.name",
    "swanlab_project": "tracking.project", "swanlab_run_name": "tracking.name",
}  # fmt: skip


def convert_llamafactory(plain: dict[str, Any], path: Path) -> Conversion:
    """A LLaMA-Factory YAML, with what dataset_info.json says of its data where that is beside it."""
    made = Conversion("a LLaMA-Factory config", path.parent)
    given = LLAMAFACTORY_DEFAULTS | plain
    given.setdefault("lora_alpha", 2 * int(given["lora_rank"]))
    take(made, given, LLAMAFACTORY, UPSTREAM | {
        "stage": _stage, "finetuning_type": _finetuning, "lora_target": carry_modules, "dataset": _llamafactory_dataset,
        "dataset_dir": _used, "eval_dataset": _llamafactory_held_out, "template": _template, "quantization_bit": _bits,
        "pref_loss": _pref_loss, "train_on_prompt": carry_train_on_prompt, "mask_history": _mask_history,
        "val_size": carry_val_size,
        "disable_gradient_checkpointing": _no_checkpointing, "seed": carry_seed,
        "additional_target": carry_list("lora.modules_to_save"),
        "warmup_steps": carry_warmup, "enable_thinking": _thinking, "use_swanlab": carry_tracker, "pissa_init": _pissa,
    })  # fmt: skip
    made.values.setdefault("dataset.loss_on", "answer")
    made.sources.setdefault("dataset.loss_on", "train_on_prompt, its default")
    mark_defaults(made, {**LLAMAFACTORY_DEFAULTS, "lora_alpha": None}, plain)
    if "tracking" not in made.choices:
        made.choose("tracking", "none")
    return made


def _used(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.needless[key] = "dataset.path says where rows are"


def _stage(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value == "dpo":
        made.choose("method", "dpo")
    elif value == "pt":
        made.put("dataset.shape", "text", key)
    elif value != "sft":
        no_method(made, key, value)
    made.needless[key] = f"method={made.choices.get('method', 'sft')}"


def _finetuning(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value == "full":
        made.choose("lora", "none")
        made.needless[key] = "lora=none trains every weight"
    elif value == "lora":
        made.needless[key] = "an adapter is what is trained"
    else:
        made.left[key] = "an adapter is trained, or every weight: lora=none"


def _template(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value in ("alpaca", "chatml"):
        made.put("dataset.template" if value == "alpaca" else "model.chat_template", value, key)
    else:
        made.needless[key] = TEMPLATE


def _bits(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value in (4, 8):
        made.put(f"model.load_in_{value}bit", True, key)
    elif value:
        made.left[key] = "weights are loaded in 4 bits, 8 bits or 16"
    else:
        made.needless[key] = "it is not set"


def _pref_loss(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value in ("sigmoid", "hinge", "ipo"):
        made.put("method.loss_type", value, key)
    else:
        no_method(made, key, value)


def _mask_history(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.put("dataset.loss_on", "last", key)
    else:
        made.needless[key] = "every answer is trained on"


def _no_checkpointing(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.put("trainer.gradient_checkpointing", False, key)
    else:
        made.needless[key] = "it is used where memory calls for it"


def _pissa(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.put("lora.extra.init_lora_weights", "pissa", key)
    else:
        made.needless[key] = "it is off"


def _thinking(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.put("dataset.chat_template_kwargs", {key: value}, key)


def _dataset_info(made: Conversion, given: dict[str, Any]) -> dict[str, Any]:
    """What dataset_info.json says, of `dataset_dir` or beside the config."""
    name = str(given.get("dataset_dir") or "data")
    name = str(given.get("dataset_dir") or "data")
    folders = [Path(name), *(folder / name for folder in (made.folder, *made.folder.resolve().parents[:3])), made.folder]
    for folder in folders:
        try:
            info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(info, dict):
            return {name: {**entry, "folder": folder} for name, entry in info.items() if isinstance(entry, dict)}
    return {}


def _llamafactory_dataset(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    names = [one.strip() for one in value.split(",")] if isinstance(value, str) else [str(one) for one in value or []]
    if not names:
        made.needless[key] = "it is not set"
        return
    for other in names[1:]:
        made.left[f"dataset: {other}"] = "one data set is trained on; files go together: 'dataset.path=[a.jsonl,b.jsonl]'"
    entry = _dataset_info(made, given).get(names[0])
    if entry is None:
        made.left[f"dataset: {names[0]}"] = "the name is one of dataset_info.json, which is not beside the config"
        return
    if entry.get("file_name"):
        made.put("dataset.path", str(entry["folder"] / str(entry["file_name"])), f"dataset: {names[0]}")
    elif entry.get("hf_hub_url"):
        put_rows(made, str(entry["hf_hub_url"]), f"dataset: {names[0]}", str(entry.get("split") or "train"))
        if entry.get("subset"):
            made.put("dataset.config_name", str(entry["subset"]), f"dataset: {names[0]}")
    columns = entry.get("columns") if isinstance(entry.get("columns"), dict) else {}
    turns = entry.get("formatting") == "sharegpt"
    roles = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
             "tools": "tools", "chosen": "chosen", "rejected": "rejected", "messages": "messages"}  # fmt: skip
    for role, column in columns.items():
        here = "text" if role == "prompt" and given.get("stage") == "pt" else roles.get(role)
        if here == "messages" and given.get("stage") == "dpo":
            here = "prompt"
        if here:
            made.put(f"dataset.columns.{here}", column, f"dataset_info.json, columns.{role}")
        else:
            made.left[f"dataset_info.json, columns.{role}"] = "there is no such role here"
    if turns and "messages" not in columns:
        made.needless["dataset_info.json, formatting"] = "turns are found by their column"


def _llamafactory_held_out(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    entry = _dataset_info(made, given).get(str(value))
    if entry and entry.get("file_name"):
        made.put("dataset.eval_path", str(entry["folder"] / str(entry["file_name"])), key)
    elif value:
        made.left[key] = "dataset.eval_path=<file> names held-out rows"
    else:
        made.needless[key] = "it is not set"
