"""The settings by their dotted keys: which there are, and which one a misspelt key was meant to be."""

import difflib
import functools
import re
import shlex
from dataclasses import fields, is_dataclass
from typing import Any

from sft.config import schema
from sft.config.schema import Settings
from sft.config.upstream import lora_config_options, sft_config_options
from sft.errors import Problem

# What people type for upstream's names.
COMMON_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "max_length": "max_seq_length",
    "file": "path",
    "format": "shape",
}


@functools.cache  # called a thousand times for a command line
def find_field(path: str) -> tuple[type | None, str]:
    """The settings class that holds `path` and the field's name; (None, "") where there is no such setting."""
    cls: Any = Settings
    parts = path.split(".")
    for i, part in enumerate(parts):
        names = {f.name for f in fields(cls)}
        if part not in names:
            return None, ""
        kind = plain_type(cls, part)
        if i == len(parts) - 1 or not is_dataclass(kind):
            free_form = str(kind).startswith("dict")
            return (cls, part) if i == len(parts) - 1 or free_form else (None, "")
        cls = kind
    return None, ""


@functools.cache
def plain_type(cls: type, name: str) -> Any:
    """The declared type of a field."""
    return next(f.type for f in fields(cls) if f.name == name)


def leaf_keys(cls: type = Settings, prefix: str = "") -> list[str]:
    """All dotted keys that hold a value."""
    keys = []
    for f in fields(cls):
        keys += leaf_keys(f.type, f"{prefix}{f.name}.") if is_dataclass(f.type) else [prefix + f.name]
    return keys


def stray_keys(plain: dict, cls: type, prefix: str = "") -> list[tuple[str, str]]:
    """(key, value) of everything in `plain` that the schema does not have."""
    known = {f.name: f.type for f in fields(cls)}
    stray = []
    for key, value in plain.items():
        if key not in known:
            stray.append((f"{prefix}{key}", str(value)))
        elif is_dataclass(known[key]) and isinstance(value, dict):
            stray += stray_keys(value, known[key], f"{prefix}{key}.")
    return stray


def unknown_key(path: str, value: str = "...") -> Problem:
    """The problem of a key that the schema does not have, with the keys it may have been meant to be."""
    group, _, last = path.rpartition(".")
    keys = leaf_keys()
    siblings = [k for k in keys if k.rpartition(".")[0] == group]
    close = [k for k in keys if k.rpartition(".")[2] == COMMON_NAMES.get(last) and k.startswith(group)]
    known_by_name = bool(close)
    close += [k for k in keys if k.rpartition(".")[2] == last]
    names = {k.rpartition(".")[2]: k for k in siblings}
    names |= {common: names[name] for common, name in COMMON_NAMES.items() if name in names}
    names |= {} if group else {name: name for name in schema.GROUPS}
    close += [names[name] for name in difflib.get_close_matches(last, names, 2, 0.6)]
    close += difflib.get_close_matches(path, keys, 2, 0.8)
    close = list(dict.fromkeys(close))[: 1 if known_by_name else 2]
    why = f"There is no setting {path}."
    if close:
        fix = in_shell(f"{close[0]}={value}")
        why += f" Did you mean {' or '.join(close)}?"
    elif group == "lora" and last in lora_config_options():
        fix = in_shell(f"lora.extra.{last}={value}")
        why += " PEFT's other options stand under lora.extra."
    elif group == "trainer" and last in sft_config_options():
        fix = in_shell(f"trainer.extra.{last}={value}")
        why += " It is an option of TRL's SFTConfig, which has its place in trainer.extra."
    else:
        fix = "docs/settings.md lists all settings"
        if not group:
            why += f" The groups are {', '.join(schema.GROUPS)}."
        elif siblings:
            why += f" {group} has: {', '.join(k.rsplit('.', 1)[-1] for k in siblings)}."
    value = value.replace("\n", "\\n")
    return Problem(f"{path}={value}", why, fix)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def typed(key: str, value: Any) -> str:
    """`key=value` as it is typed in a shell, in quotes where the shell or Hydra would read the text otherwise."""
    text = f"{key}={_for_hydra(value)}"
    return text if re.fullmatch(r"[\w,./+=\[\]-]*", text, re.ASCII) else shlex.quote(text)


def words_of(value: Any) -> str:
    """A value in Hydra's grammar, as train.py gets it from the shell."""
    return _for_hydra(value)


def in_shell(override: str) -> str:
    """An override as it came from the shell, as it is typed there: in quotes where the shell would change it."""
    return override if re.fullmatch(r"[\w./,:=@%+^~\[\]-]*", override) else shlex.quote(override)


def _for_hydra(value: Any) -> str:
    """A value in Hydra's grammar; a text in quotes, unless it is a plain word and nothing that Hydra takes for a value."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_for_hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_for_hydra, value))}]"
    if not isinstance(value, str):
        return shown(value)
    plain = r"(?!(null|true|false|inf|nan)$)(?=.*[A-Za-z])[A-Za-z_./][\w./+-]*"
    if re.fullmatch(plain, value, re.ASCII | re.IGNORECASE):
        return value
    escaped = value.replace("\n", "\\n").replace('"', '\\"')
    return f'"{escaped}"'


def shown(value: Any) -> str:
    """A setting's value as it is typed on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
    return text.replace("\n", "\\n")
