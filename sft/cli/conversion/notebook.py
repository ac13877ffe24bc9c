"""Unsloth's notebooks, and scripts that make the same calls."""

import re
from pathlib import Path
from typing import Any

from sft.cli.conversion.calls import UNKNOWN, Call, read_calls
from sft.cli.conversion.carried import (
    FORMAT,
    METHOD,
    OWN_CODE,
    PRECISION,
    UPSTREAM,
    Conversion,
    carry_modules,
    carry_remote_code,
    carry_rewards,
    carry_seed,
    mark_defaults,
    no_method,
    put_rows,
    take,
)
from sft.config.upstream import lora_config_options
from sft.errors import refuse

OBJECTS = {
    **dict.fromkeys(("model", "tokenizer", "processing_class", "args", "train_dataset", "eval_dataset", "peft_config"), ""),
    "data_collator": OWN_CODE,
    "callbacks": OWN_CODE,
    "formatting_func": FORMAT,
    "ref_model": "method.reference has the model before training",
}
"""Arguments of a notebook's trainer that hold objects; an empty reason: its own call was read."""

CONFIGS = {
    "SFTConfig": 2e-5,
    "TrainingArguments": 5e-5,
    "UnslothTrainingArguments": 5e-5,
    "DPOConfig": 1e-6,
    "GRPOConfig": 1e-6,
}
"""Arguments of a trainer, with their default learning rate."""

TRAINERS = {"SFTTrainer": "sft", "UnslothTrainer": "sft", "Trainer": "sft", "DPOTrainer": "dpo", "GRPOTrainer": "grpo"}

NO_TRAINERS = ("KTOTrainer", "ORPOTrainer", "CPOTrainer", "RewardTrainer", "PPOTrainer")

LOADED = {"model_name": "model.name", "max_seq_length": "model.max_seq_length", "load_in_4bit": "model.load_in_4bit",
          "load_in_8bit": "model.load_in_8bit", "revision": "model.revision"}  # fmt: skip

ADAPTER = {"r": "lora.r", "lora_alpha": "lora.lora_alpha", "lora_dropout": "lora.lora_dropout", "bias": "lora.bias",
           "use_rslora": "lora.use_rslora", "use_dora": "lora.use_dora", "modules_to_save": "lora.modules_to_save"}  # fmt: skip

ARGUMENTS_DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0, "lr_scheduler_type": "linear",
    "warmup_steps": 0, "weight_decay": 0.0, "load_best_model_at_end": False,
}  # fmt: skip


def convert_notebook(path: Path) -> Conversion:
    """An Unsloth notebook, or a script that makes the same calls."""
    source = read_calls(path)
    made = Conversion("an Unsloth notebook", path.parent)
    named = {call.name for call in source.calls}
    loads = [
        call for call in source.calls if call.name == "from_pretrained" and re.search("Fast.*Model|AutoModelFor", call.owner)
    ]
    if not loads:
        why = "It has no call of FastLanguageModel.from_pretrained, as Unsloth's notebooks have."
        raise refuse(f"from={path}", why, "data=my_data.jsonl   to begin with a file of rows")
    for other in sorted(named & set(NO_TRAINERS)):
        no_method(made, "trainer", other)
    _take_model(made, loads[-1])
    adapters = [call for call in source.calls if call.name in ("get_peft_model", "LoraConfig") and call.given]
    for call in adapters[-1:]:
        _take_adapter(made, call)
    if not adapters:
        made.choose("lora", "none")
    trainers = [call for call in source.calls if call.name in TRAINERS]
    method = TRAINERS[trainers[-1].name] if trainers else "sft"
    if method != "sft":
        made.choose("method", method)
    arguments: dict[str, Any] = {}
    for call in source.calls:
        if call.name in CONFIGS:
            arguments = {**ARGUMENTS_DEFAULTS, "learning_rate": CONFIGS[call.name], **call.given}
    inside = {key: value for call in trainers[-1:] for key, value in call.given.items() if key not in OBJECTS}
    for key in {key for call in trainers[-1:] for key in call.given} & set(OBJECTS):
        if why := OBJECTS[key]:
            (made.left if why in (OWN_CODE, FORMAT) else made.needless)[key] = why
    _take_arguments(made, {**arguments, **inside}, method)
    given = {key for call in source.calls if call.name in CONFIGS for key in call.given}
    mark_defaults(made, {**ARGUMENTS_DEFAULTS, "learning_rate": 0}, dict.fromkeys(given))
    _take_rows(made, source.calls, [key for call in trainers[-1:] for key in call.given])
    _take_text(made, source.texts, named, method)
    for name in sorted(name for name in named if re.match("save_pretrained_(merged|gguf)|push_to_hub", name)):
        kind = "gguf" if "gguf" in name else "merged_16bit"
        made.left[name] = (
            f"export={kind}" + (" export.hub.repo=<user>/<name>" if "push" in name else "") + "   does it after training"
        )
    if source.unread:
        made.left[f"{source.unread} cells"] = "they are no Python that can be read"
    if "tracking" not in made.choices:
        made.choose("tracking", "none")
    return made


def _take_model(made: Conversion, call: Call) -> None:
    given = {**({"model_name": call.positional[0]} if call.positional else {}), **call.given}
    if call.owner.startswith("Fast"):
        given = {"max_seq_length": 2048, "load_in_4bit": True, **given}
    elif "pretrained_model_name_or_path" in given:
        given["model_name"] = given.pop("pretrained_model_name_or_path")
    take(made, given, LOADED, {
        "dtype": lambda made, key, value, given: made.needless.update({key: PRECISION}),
        "trust_remote_code": carry_remote_code, "token": _token, "full_finetuning": _full,
        "use_gradient_checkpointing": _checkpointing,
    })  # fmt: skip
    for key in ("max_seq_length", "load_in_4bit"):
        if key not in call.given and f"model.{key}" in made.sources:
            made.sources[f"model.{key}"] = f"{key}, its default"
    if "dtype" in made.left:
        made.needless["dtype"] = PRECISION
        del made.left["dtype"]


def _checkpointing(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.put("trainer.gradient_checkpointing", bool(value), key)


def _layers(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.needless[key] = "lora.target_modules names the layers of the language model"


def _token(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.needless[key] = "HF_TOKEN in the environment, or hf auth login"


def _full(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.choose("lora", "none")
    made.needless[key] = "lora= says it"


def _take_adapter(made: Conversion, call: Call) -> None:
    special = {
        "target_modules": carry_modules,
        "random_state": carry_seed,
        "use_gradient_checkpointing": _checkpointing,
        **dict.fromkeys(("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules"), _layers),
        "task_type": lambda made, key, value, given: made.needless.update({key: "a causal language model"}),
    }
    known = {key: value for key, value in call.given.items() if key in ADAPTER or key in special or value in (None, False)}
    take(made, known, ADAPTER, special)
    for key, value in call.given.items():
        if key not in known and key in lora_config_options():
            made.put(f"lora.extra.{key}", value, key) if value is not UNKNOWN else made.left.update({key: "it is an object"})
        elif key not in known:
            made.left[key] = "there is no such setting here"


def _take_arguments(made: Conversion, given: dict[str, Any], method: str) -> None:
    """Those of a trainer and of its config."""
    given = {key: value for key, value in given.items() if key not in ("fp16", "bf16")}
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    if method == "grpo" and all(isinstance(given.get(key), int) for key in sizes):
        rows = given.pop(sizes[0]) * given.pop(sizes[1])
        made.put(
            "trainer.effective_batch_size",
            max(1, rows // int(given["num_generations"])),
            "per_device_train_batch_size, in prompts",
        )
    special = UPSTREAM | {"seed": carry_seed, "reward_funcs": carry_rewards, "reward_processing_classes": carry_rewards}
    if method != "sft":
        special |= {name: _method_setting for name in METHOD if name in given and name != "reward_funcs"}
    take(made, given, {"run_name": "tracking.name"}, special)
    made.needless["fp16, bf16"] = PRECISION


def _method_setting(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value is None:
        made.needless[key] = "it is not set"
    else:
        made.put(f"method.{key}", value, key)


def _take_rows(made: Conversion, calls: list[Call], of_trainer: list[str]) -> None:
    """The data of `load_dataset`; what is loaded into a variable for evaluation is held out."""
    for call in calls:
        if call.name == "train_test_split":
            made.put("dataset.eval_fraction", call.given.get("test_size", 0.25), "train_test_split, test_size")
        if call.name not in ("load_dataset", "from_json", "from_csv"):
            continue
        first = call.positional[0] if call.positional else call.given.get("path", UNKNOWN)
        files = call.given.get("data_files")
        held_out = re.search("eval|val|test", call.target)
        split = call.given.get("split", "train")
        if isinstance(files, dict):
            put_rows(made, str(files.get("train", next(iter(files.values()), ""))), "load_dataset")
            for name in ("validation", "test"):
                if name in files:
                    put_rows(made, str(files[name]), "load_dataset", key="eval_path")
                    break
        elif files is UNKNOWN or first is UNKNOWN or not isinstance(split, str):
            made.left["load_dataset"] = "its arguments are known only where the notebook runs"
        elif files or call.name != "load_dataset":
            places = files if files else first
            put_rows(
                made,
                str(places[0] if isinstance(places, list) else places),
                "load_dataset",
                key="eval_path" if held_out else "path",
            )
        elif held_out and "dataset.name" in made.values and first == made.values["dataset.name"]:
            made.put("dataset.eval_split", split, "load_dataset, split")
        elif "dataset.name" in made.values or "dataset.path" in made.values:
            made.left[f"load_dataset {first}"] = "one data set is trained on"
        else:
            put_rows(made, str(first), "load_dataset", split)
            if len(call.positional) > 1 and isinstance(call.positional[1], str):
                made.put("dataset.config_name", call.positional[1], "load_dataset")
    if made.values.get("dataset.eval_split") or made.values.get("dataset.eval_path"):
        made.values["dataset.eval_fraction"] = 0.0
        made.sources["dataset.eval_fraction"] = "eval_dataset"
    elif "dataset.eval_fraction" not in made.values and "eval_dataset" not in of_trainer:
        made.put("dataset.eval_fraction", 0.0, "eval_dataset, which is not set")


def _take_text(made: Conversion, texts: list[str], named: set[str], method: str) -> None:
    """How rows become text, as far as calls and texts tell."""
    if "get_chat_template" in named or "apply_chat_template" in named:
        made.put("dataset.template", "chat", "apply_chat_template")
    elif any("### Instruction:" in text and "{}" in text for text in texts):
        made.put("dataset.template", "alpaca", "the text with ### Instruction:")
    if "map" in named:
        made.left["map"] = FORMAT
    if method == "sft":
        whole = "train_on_responses_only" not in named
        made.put("dataset.loss_on", "all" if whole else "answer", "train_on_responses_only" + ", which is not called" * whole)
