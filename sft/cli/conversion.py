"""Settings of another project's run in this project's words: an Unsloth notebook, an Axolotl or a LLaMA-Factory config.

Every key is carried over, needs nothing here, or is listed as not carried over, each with the reason. Nothing of a notebook is
run; YAML goes through the safe loader.
"""

import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import yaml

from sft.cli.notebook_calls import UNKNOWN, Call, read_calls
from sft.cli.overrides import looks_secret
from sft.cli.preset_file import comment_of
from sft.config.data_files import kind_of
from sft.config.rules import WITHOUT_EFFECT
from sft.config.schema import MethodSettings, TrainerSettings
from sft.config.upstream import lora_config_options, sft_config_options
from sft.errors import Problem, Refusal, first_line, refuse


@dataclass
class Conversion:
    """What became of a config's keys."""

    kind: str
    """What it is: `an Axolotl config`."""
    folder: Path
    """Where it lies; its paths may be relative to that."""
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """The key there of each setting here."""
    choices: dict[str, str] = field(default_factory=dict)
    """Options of groups."""
    needless: dict[str, str] = field(default_factory=dict)
    """Keys that need nothing here, with the reason."""
    left: dict[str, str] = field(default_factory=dict)
    """Keys that are not carried over, with the reason."""
    problems: list[Problem] = field(default_factory=list)

    def put(self, key: str, value: Any, source: str) -> None:
        """Carry a value over to a setting."""
        if isinstance(value, str) and looks_secret(f"x={value}"):
            self.left[source] = "it looks like a secret, which belongs into the environment: HF_TOKEN, WANDB_API_KEY"
            return
        self.values[key], self.sources[key] = value, source

    def choose(self, group: str, option: str) -> None:
        """Choose an option of a group."""
        self.choices[group] = option

    def replace_rows(self, path: str | list[str]) -> None:
        """Take the rows of this file in place of the config's."""
        for key in ("name", "config_name", "revision", "split", "eval_split", "eval_path"):
            self.values.pop(f"dataset.{key}", None)
        self.put("dataset.path", path, "as typed")

    def leave_out(self, problems: list[Problem]) -> bool:
        """Take settings out that are refused, but for where rows and model are; whether there were any."""
        keys = {re.split(r"[=:]", problem.what)[0]: problem.why for problem in problems}
        refused = [key for key in self.values if key in keys and key not in ("model.name", "dataset.path", "dataset.name")]
        for key in refused:
            del self.values[key]
            self.left[self.sources.pop(key, key)] = f"{key} is refused: {keys[key]}"
        return bool(refused)

    def comments(self) -> dict[str, str]:
        """What stands behind each setting: its meaning, and the key that it comes from."""
        named = {key: source for key, source in self.sources.items() if source != key.rpartition(".")[2] and key in self.values}
        return {key: f"{comment_of(key)} ({source})" for key, source in named.items()}

    def about(self, name: str) -> list[str]:
        """The lines above the settings."""
        lines = [f"From {name}, {self.kind}."]
        return lines + textwrap.wrap("Not carried over: " + ", ".join(self.left), 110) if self.left else lines

    def report(self, name: str) -> str:
        """What became of every key."""
        lines = [f"{len(self.values)} settings of {name} are carried over."]
        for title, found in (("Needs nothing here", self.needless), ("Not carried over", self.left)):
            lines += [f"\n{title}:", *(f"  {' '.join(key.split()):<34} {why}" for key, why in found.items())] if found else []
        return "\n".join(lines) + "\n"


PRECISION = "model.dtype=auto chooses the number format by the GPU"
PADDING_FREE = "rows are concatenated instead of padded where the model allows it, and never mixed"
FOLDER = "each run has a folder of its own in outputs/"
SPEED = "kernels and memory are chosen by the plan; sft preflight shows it"
WORKERS = "tokens are kept in a cache, and no worker is waited for"
TEMPLATE = "the tokenizer's own chat template takes its place; the preview shows it"
OWN_CODE = "it is code, for which there is no place here"
FORMAT = "it is code; dataset.format=rows.py:<function> takes one of your own, and the preview shows how rows are read"

ITS_CONFIG = "the model's own config says it"
COMMAND = "the command says what is done"
NF4 = "4-bit weights are nf4 of bitsandbytes"

REASONS = {
    PRECISION: """bf16 fp16 tf32 pure_bf16 bfloat16 float16 fp16_full_eval bf16_full_eval""",
    PADDING_FREE: """
        eval_sample_packing pad_to_sequence_len padding_free eval_packing
        packing_strategy sample_packing_eff_est pad_to_multiple_of""",
    FOLDER: """output_dir overwrite_output_dir logging_dir logging_first_step plot_loss""",
    SPEED: """
        flash_attention xformers_attention sdp_attention flash_attn attn_implementation use_unsloth enable_liger_kernel
        use_liger_kernel use_unsloth_gc gradient_checkpointing_kwargs plugins liger_rope liger_rms_norm
        liger_glu_activation liger_fused_linear_cross_entropy torch_compile fast_inference gpu_memory_utilization
        max_lora_rank device_map low_cpu_mem_usage lora_mlp_kernel lora_qkv_kernel lora_o_kernel unsloth_tiled_mlp""",
    WORKERS: """
        dataset_prepared_path overwrite_cache preprocessing_num_workers dataloader_num_workers dataset_num_proc
        dataset_processes dataloader_pin_memory num_proc tokenized_path dataloader_prefetch_factor
        preprocessing_batch_size""",
    ITS_CONFIG: """
        model_type tokenizer_type tokenizer_config use_fast_tokenizer is_llama_derived_model
        processor_type""",
    COMMAND: """
        do_train do_eval do_predict strict debug local_rank predict_with_generate ddp_timeout remove_unused_columns
        auto_resume_from_checkpoints save_only_model dataset_kwargs save_safetensors include_num_input_tokens_seen
        skip_prepare_dataset""",
    NF4: """quantization_method double_quantization bnb_config_kwargs""",
    "the same command goes on by itself": """resume_from_checkpoint""",
    "the text is made of the row by dataset.template": """dataset_text_field""",
    "prompt and answer share model.max_seq_length": """max_prompt_length""",
}
NEEDLESS = {key: why for why, keys in REASONS.items() for key in keys.split()}
"""Keys of any of the projects that need nothing here, with the reason."""

PLACES = {
    "trainer": {"model": "", "tokenizer": "", "processing_class": "", "args": "", "data_collator": OWN_CODE,
                "train_dataset": "", "eval_dataset": "", "formatting_func": FORMAT, "callbacks": OWN_CODE,
                "peft_config": "", "ref_model": "method.reference has the model before training"},
}  # fmt: skip
"""Arguments of a notebook's trainer that hold objects; an empty reason: its own call was read."""


def convert(path: Path, method: str | None = None) -> Conversion:
    """Read a notebook, a script or a config, whose method may be another. Raises Refusal for a file of none of the three kinds,
    and for a method that there is not here.
    """
    try:
        made = convert_notebook(path) if path.suffix in (".ipynb", ".py") else _convert_yaml(path)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise refuse(
            f"from={path}", f"A value in it is of another kind than it should be: {first_line(error)}.", "mend it"
        ) from error
    steps = made.values.get("trainer.max_steps", -1)
    if isinstance(steps, int) and steps > 0:  # the epochs would be ignored
        made.needless[made.sources.pop("trainer.num_train_epochs", "epochs")] = "max_steps decides the length"
        made.values.pop("trainer.num_train_epochs", None)
    if made.problems and method is None:
        raise Refusal(made.problems)
    if method and method != made.choices.get("method", "sft"):
        made.values = {key: value for key, value in made.values.items() if not key.startswith("method.")}
    if made.choices.get("lora") == "none":
        made.values = {key: value for key, value in made.values.items() if not key.startswith("lora.")}
    return made


def _convert_yaml(path: Path) -> Conversion:
    plain = _read_yaml(path)
    if "base_model" in plain:
        return convert_axolotl(plain, path)
    if "model_name_or_path" in plain:
        return convert_llamafactory(plain, path)
    why = "It has neither base_model, as Axolotl's configs, nor model_name_or_path, as LLaMA-Factory's."
    raise refuse(f"from={path}", why, "data=my_data.jsonl   to begin with a file of rows")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise refuse(f"from={path}", f"It cannot be read as YAML: {first_line(error)}.", "mend the file") from error
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise refuse(f"from={path}", "It is no table of settings.", "data=my_data.jsonl   to begin with a file of rows")
    # YAML reads 2e-4 as a text.
    return {
        key: float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+", value) else value
        for key, value in plain.items()
    }


# ------------------------------------------------------------------------------------------------ what all three share


def take(made: Conversion, given: dict[str, Any], renamed: dict[str, str], special: dict[str, Callable[..., None]]) -> None:
    """Carry each key over: by a function of its own, by a new name, or by what is known of upstream's arguments."""
    known = {key: value for key, value in given.items() if value is not UNKNOWN}
    for key, value in given.items():
        if value is UNKNOWN and key not in NEEDLESS and special.get(key) is not _rewards:
            made.left[key] = "its value is known only where the notebook runs"
        elif key in special:
            special[key](made, key, value, known)
        elif value is None or value in ("", [], {}):
            made.needless[key] = "it is not set"
        elif key in renamed:
            made.put(renamed[key], value, key)
        elif key in NEEDLESS:
            made.needless[key] = NEEDLESS[key]
        elif value is False and key not in TRAINER:
            made.needless[key] = "it is off"
        elif re.match("liger_", key):
            made.needless[key] = SPEED
        elif re.match("fsdp|deepspeed|ddp_|dp_|(tensor|context|pipeline|expert)_(model_)?parallel", key):
            made.left[key] = "distributed=ddp or distributed=fsdp spreads a run over GPUs"
        elif key in TRAINER:
            made.put(f"trainer.{key}", value, key)
        elif key in sft_config_options() - WITHOUT_EFFECT:
            made.put(f"trainer.extra.{key}", value, key)
        else:
            made.left[key] = "there is no such setting here"


TRAINER = {one.name for one in fields_of(TrainerSettings)} - {"extra"}

METHOD = {one.name for one in fields_of(MethodSettings)} - {"name", "reference"}


def _warmup(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value or not (given.get("warmup_steps") or given.get("warmup_ratio")):
        made.put("trainer.warmup_steps", value or 0, key)
    else:
        made.needless[key] = "it is not set"


def _every(name: str) -> Callable[..., None]:
    """`save_strategy` and `eval_strategy`: once an epoch is a share of all steps."""

    def carry(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
        epochs = float(given.get("num_train_epochs") or given.get("num_epochs") or 3)
        if value == "epoch" and epochs > 1:
            made.put(f"trainer.{name}", round(1 / epochs, 4), key)
        else:
            made.needless[key] = f"trainer.{name} says how often"

    return carry


def _often(name: str) -> Callable[..., None]:
    """`save_steps` and `eval_steps`, unless a strategy says otherwise."""

    def carry(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
        strategy = given.get(key.replace("_steps", "_strategy")) or "steps"
        if strategy == "steps" and value:
            made.put(f"trainer.{name}", value, key)
        else:
            made.needless[key] = f"the strategy is {strategy}"

    return carry


def _per_epoch(name: str) -> Callable[..., None]:
    def carry(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
        parts = float(value or 0) * float(given.get("num_epochs") or 1)
        if parts > 1:
            made.put(f"trainer.{name}", round(1 / parts, 4), key)
        else:
            made.needless[key] = "it is done at the end anyway"

    return carry


def _report_to(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    names = [value] if isinstance(value, str) else list(value or ["none"])
    known = [name for name in names if name in ("wandb", "tensorboard", "mlflow", "swanlab", "trackio", "none")]
    if len(known) == 1:
        made.choose("tracking", known[0])
        made.needless[key] = f"tracking={known[0]} stands for it"
    elif known:
        made.put("tracking.trackers", known, key)
    else:
        made.left[key] = "tracking= has wandb, tensorboard, mlflow, swanlab, trackio, none"


def _hub(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value and isinstance(value, str) and "/" in value and not looks_secret(f"x={value}"):
        made.left[key] = f"export=adapter export.hub.repo={value}   pushes it"
    elif value:
        made.left[key] = "export=adapter export.hub.repo=<user>/<name>   pushes it"
    else:
        made.needless[key] = "nothing is pushed unless export.hub.repo is set"


def _remote_code(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.left[key] = "model.trust_remote_code=true is said by whoever has read the model's code; most need none"
    else:
        made.needless[key] = "it is off"


def _length(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.values.setdefault("model.max_seq_length", value)
        made.sources.setdefault("model.max_seq_length", key)


def _packing(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.left[key] = (
            f"{PADDING_FREE}; but a batch counts rows here, not sequences of several: trainer.effective_batch_size=..."
        )
    else:
        made.needless[key] = "it is off"


def _seed(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value is None:
        made.needless[key] = "it is not set"
    else:
        made.put("seed", value, key)


def _modules(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    """The targets of an adapter: names, or a word for all linear layers."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value or [])
    if not names:
        made.needless[key] = "it is not set"
    else:
        made.put("lora.target_modules", ["all-linear"] if names in (["all"], ["all-linear"]) else names, key)


UPSTREAM: dict[str, Callable[..., None]] = {
    "warmup_steps": _warmup,
    "warmup_ratio": _warmup,
    "save_strategy": _every("save_steps"),
    "eval_strategy": _every("eval_steps"),
    "evaluation_strategy": _every("eval_steps"),
    "save_steps": _often("save_steps"),
    "eval_steps": _often("eval_steps"),
    "logging_strategy": lambda made, key, value, given: made.needless.update({key: "trainer.logging_steps says how often"}),
    "report_to": _report_to,
    "trust_remote_code": _remote_code,
    **dict.fromkeys(("packing", "sample_packing", "neat_packing"), _packing),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"), _hub),
    **dict.fromkeys(("max_length", "max_seq_length"), _length),
}
"""transformers' and TRL's arguments that are more than a name."""


def _dataset(made: Conversion, place: str, source: str, split: str = "train", key: str = "path") -> None:
    """Where rows are: a file or folder, also one beside the config, or a data set of the hub."""
    if re.match(r"\w+://", place):
        made.left[f"{source}: {place}"] = "download the file and name it: data=<file>"
        return
    beside = made.folder / place
    local = Path(place).exists() or beside.exists() or kind_of(Path(place)) or place.startswith(("/", ".", "~"))
    if key == "eval_path" and not local:
        made.left[source] = "held-out rows of another data set of the hub: dataset.eval_split or dataset.eval_path"
    elif local:
        there = beside if not Path(place).exists() and beside.exists() else Path(place)
        made.put(f"dataset.{key}", str(there), source)
    else:
        made.put("dataset.name", place, source)
        if split != "train":
            made.put("dataset.split", split, f"{source}, its split")


def _no_method(made: Conversion, key: str, value: Any) -> None:
    made.problems.append(
        Problem(
            f"{key}: {value}",
            "There is no such method here; there are sft, dpo and grpo.",
            "goal=preferences   or   goal=answer",
        )
    )


# ------------------------------------------------------------------------------------------------------------ Axolotl

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
        "lora_target_modules": _modules, "lora_target_linear": _axolotl_linear, "train_on_inputs": _train_on_prompt,
        "chat_template": _chat_template, "saves_per_epoch": _per_epoch("save_steps"),
        "evals_per_epoch": _per_epoch("eval_steps"), "trl": _axolotl_trl, "seed": _seed,
        "val_set_size": _val_size, "special_tokens": _special_tokens,
        "excess_length_strategy": _excess, "use_wandb": _axolotl_tracker, "use_mlflow": _axolotl_tracker,
        "use_tensorboard": _axolotl_tracker, "use_swanlab": _axolotl_tracker, "eot_tokens": _special_tokens,
    })  # fmt: skip
    made.values.setdefault("dataset.loss_on", "answer")
    if "dataset.overlong" not in made.values:
        made.put("dataset.overlong", "drop", "excess_length_strategy, its default")
    _mark_defaults(made, AXOLOTL_DEFAULTS, plain)
    if "tracking" not in made.choices:
        made.choose("tracking", "wandb" if plain.get("wandb_project") else "none")
    return made


def _mark_defaults(made: Conversion, defaults: dict[str, Any], plain: dict[str, Any]) -> None:
    for key, source in made.sources.items():
        if source in defaults and source not in plain:
            made.sources[key] = f"{source}, its default"


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
        _no_method(made, key, value)
    else:
        made.needless[key] = "it is not set"


def _axolotl_linear(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value and not given.get("lora_target_modules"):
        made.put("lora.target_modules", ["all-linear"], key)
    else:
        made.needless[key] = "lora_target_modules names the layers" if value else "it is off"


def _train_on_prompt(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.put("dataset.loss_on", "all" if value else "answer", key)


def _chat_template(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value == "chatml":
        made.put("model.chat_template", "chatml", key)
    else:
        made.needless[key] = TEMPLATE


def _special_tokens(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.left[key] = "padding and end marks are the tokenizer's own; the preview shows them"


def _excess(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.put("dataset.overlong", "truncate" if value == "truncate" else "drop", key)


def _axolotl_tracker(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.choose("tracking", key.removeprefix("use_"))
    made.needless[key] = "tracking= says it"


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
        _dataset(made, str(first["path"]), key, key="eval_path")
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
    _dataset(made, place, "datasets.path", str(entry.pop("split", "train")))
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
            _chat_template(made, source, inner, given)
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


# ------------------------------------------------------------------------------------------------------ LLaMA-Factory

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
        "stage": _stage, "finetuning_type": _finetuning, "lora_target": _modules, "dataset": _llamafactory_dataset,
        "dataset_dir": _used, "eval_dataset": _llamafactory_held_out, "template": _template, "quantization_bit": _bits,
        "pref_loss": _pref_loss, "train_on_prompt": _train_on_prompt, "mask_history": _mask_history, "val_size": _val_size,
        "disable_gradient_checkpointing": _no_checkpointing, "seed": _seed, "additional_target": _list("lora.modules_to_save"),
        "warmup_steps": _warmup, "enable_thinking": _thinking, "use_swanlab": _axolotl_tracker, "pissa_init": _pissa,
    })  # fmt: skip
    made.values.setdefault("dataset.loss_on", "answer")
    made.sources.setdefault("dataset.loss_on", "train_on_prompt, its default")
    _mark_defaults(made, {**LLAMAFACTORY_DEFAULTS, "lora_alpha": None}, plain)
    if "tracking" not in made.choices:
        made.choose("tracking", "none")
    return made


def _used(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.needless[key] = "dataset.path says where rows are"


def _list(name: str) -> Callable[..., None]:
    def carry(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
        names = [one.strip() for one in value.split(",")] if isinstance(value, str) else list(value or [])
        if names:
            made.put(name, names, key)
        else:
            made.needless[key] = "it is not set"

    return carry


def _stage(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value == "dpo":
        made.choose("method", "dpo")
    elif value == "pt":
        made.put("dataset.shape", "text", key)
    elif value != "sft":
        _no_method(made, key, value)
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
        _no_method(made, key, value)


def _mask_history(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.put("dataset.loss_on", "last", key)
    else:
        made.needless[key] = "every answer is trained on"


def _val_size(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    share = float(value or 0)
    if share >= 1:
        made.put("dataset.max_eval_rows", int(share), key)
    else:
        made.put("dataset.eval_fraction", share, key)


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
        _dataset(made, str(entry["hf_hub_url"]), f"dataset: {names[0]}", str(entry.get("split") or "train"))
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


# ----------------------------------------------------------------------------------------------------------- notebook

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
        _no_method(made, "trainer", other)
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
    inside = {key: value for call in trainers[-1:] for key, value in call.given.items() if key not in PLACES["trainer"]}
    for key in {key for call in trainers[-1:] for key in call.given} & set(PLACES["trainer"]):
        if why := PLACES["trainer"][key]:
            (made.left if why in (OWN_CODE, FORMAT) else made.needless)[key] = why
    _take_arguments(made, {**arguments, **inside}, method)
    given = {key for call in source.calls if call.name in CONFIGS for key in call.given}
    _mark_defaults(made, {**ARGUMENTS_DEFAULTS, "learning_rate": 0}, dict.fromkeys(given))
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
        "trust_remote_code": _remote_code, "token": _token, "full_finetuning": _full,
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
        "target_modules": _modules,
        "random_state": _seed,
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
    special = UPSTREAM | {"seed": _seed, "reward_funcs": _rewards, "reward_processing_classes": _rewards}
    if method != "sft":
        special |= {name: _method_setting for name in METHOD if name in given and name != "reward_funcs"}
    take(made, given, {"run_name": "tracking.name"}, special)
    made.needless["fp16, bf16"] = PRECISION


def _method_setting(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value is None:
        made.needless[key] = "it is not set"
    else:
        made.put(f"method.{key}", value, key)


def _rewards(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.left[key] = "they are code; put the functions into a file: 'method.reward_funcs=[rewards.py:<function>]'"


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
            _dataset(made, str(files.get("train", next(iter(files.values()), ""))), "load_dataset")
            for name in ("validation", "test"):
                if name in files:
                    _dataset(made, str(files[name]), "load_dataset", key="eval_path")
                    break
        elif files is UNKNOWN or first is UNKNOWN or not isinstance(split, str):
            made.left["load_dataset"] = "its arguments are known only where the notebook runs"
        elif files or call.name != "load_dataset":
            places = files if files else first
            _dataset(
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
            _dataset(made, str(first), "load_dataset", split)
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
