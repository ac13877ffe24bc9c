"""What became of another project's keys, and how those that several projects share are carried over."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from sft.cli.conversion.calls import UNKNOWN
from sft.cli.overrides import looks_secret
from sft.cli.preset_file import comment_of
from sft.config.data_files import kind_of
from sft.config.extra_rules import WITHOUT_EFFECT
from sft.config.schema import MethodSettings, TrainerSettings
from sft.config.upstream import sft_config_options
from sft.errors import Problem


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


def take(made: Conversion, given: dict[str, Any], renamed: dict[str, str], special: dict[str, Callable[..., None]]) -> None:
    """Carry each key over: by a function of its own, by a new name, or by what is known of upstream's arguments."""
    known = {key: value for key, value in given.items() if value is not UNKNOWN}
    for key, value in given.items():
        if value is UNKNOWN and key not in NEEDLESS and special.get(key) is not carry_rewards:
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


def carry_warmup(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
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


def carry_per_epoch(name: str) -> Callable[..., None]:
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


def carry_remote_code(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
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


def carry_seed(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value is None:
        made.needless[key] = "it is not set"
    else:
        made.put("seed", value, key)


def carry_modules(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    """The targets of an adapter: names, or a word for all linear layers."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value or [])
    if not names:
        made.needless[key] = "it is not set"
    else:
        made.put("lora.target_modules", ["all-linear"] if names in (["all"], ["all-linear"]) else names, key)


UPSTREAM: dict[str, Callable[..., None]] = {
    "warmup_steps": carry_warmup,
    "warmup_ratio": carry_warmup,
    "save_strategy": _every("save_steps"),
    "eval_strategy": _every("eval_steps"),
    "evaluation_strategy": _every("eval_steps"),
    "save_steps": _often("save_steps"),
    "eval_steps": _often("eval_steps"),
    "logging_strategy": lambda made, key, value, given: made.needless.update({key: "trainer.logging_steps says how often"}),
    "report_to": _report_to,
    "trust_remote_code": carry_remote_code,
    **dict.fromkeys(("packing", "sample_packing", "neat_packing"), _packing),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"), _hub),
    **dict.fromkeys(("max_length", "max_seq_length"), _length),
}
"""transformers' and TRL's arguments that are more than a name."""


def put_rows(made: Conversion, place: str, source: str, split: str = "train", key: str = "path") -> None:
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


def no_method(made: Conversion, key: str, value: Any) -> None:
    made.problems.append(
        Problem(
            f"{key}: {value}",
            "There is no such method here; there are sft, dpo and grpo.",
            "goal=preferences   or   goal=answer",
        )
    )


def mark_defaults(made: Conversion, defaults: dict[str, Any], plain: dict[str, Any]) -> None:
    for key, source in made.sources.items():
        if source in defaults and source not in plain:
            made.sources[key] = f"{source}, its default"


def carry_train_on_prompt(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.put("dataset.loss_on", "all" if value else "answer", key)


def carry_chat_template(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value == "chatml":
        made.put("model.chat_template", "chatml", key)
    else:
        made.needless[key] = TEMPLATE


def carry_special_tokens(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.left[key] = "padding and end marks are the tokenizer's own; the preview shows them"


def carry_tracker(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    if value:
        made.choose("tracking", key.removeprefix("use_"))
    made.needless[key] = "tracking= says it"


def carry_list(name: str) -> Callable[..., None]:
    def carry(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
        names = [one.strip() for one in value.split(",")] if isinstance(value, str) else list(value or [])
        if names:
            made.put(name, names, key)
        else:
            made.needless[key] = "it is not set"

    return carry


def carry_val_size(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    share = float(value or 0)
    if share >= 1:
        made.put("dataset.max_eval_rows", int(share), key)
    else:
        made.put("dataset.eval_fraction", share, key)


def carry_rewards(made: Conversion, key: str, value: Any, given: dict[str, Any]) -> None:
    made.left[key] = "they are code; put the functions into a file: 'method.reward_funcs=[rewards.py:<function>]'"
