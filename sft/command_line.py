"""Read the command line before Hydra does, and refuse it with every problem in one message.

Hydra stops at the first mistake, exits with 1 and tells people to type `+` before a misspelt key, which walks past the
schema. Here each override is checked against the schema first, then each job is composed and its settings checked.
"""

import difflib
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft import settings as schema
from sft.errors import Problem, Refusal, first_line
from sft.settings import Settings
from sft.validate import check_settings

SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd"}
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9-]{16,}|wandb_v1_\w{16,}|[0-9a-f]{40})\b")

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


def stop_on_refusal(config_dir: Path, argv: list[str] | None = None, hardware: bool = True) -> None:
    """Run `check_command_line`; on a refusal print it to stderr and exit with 2."""
    try:
        check_command_line(config_dir, sys.argv[1:] if argv is None else argv, hardware)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        raise SystemExit(2) from None


def check_command_line(config_dir: Path, argv: list[str], hardware: bool = True) -> None:
    """Compose what `argv` asks for and raise one Refusal with every problem in it.

    `hardware=False` leaves out what depends on this machine (a GPU, installed backends), for commands that only look.
    Flags that ask Hydra for information are left to Hydra. Takes about 0.3 s; multirun checks each value once.
    """
    args = get_args_parser().parse_args(argv)
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return
    extra_dir = getattr(args, "config_dir", None)
    if extra_dir and not Path(extra_dir).is_dir():
        raise Refusal([Problem(f"--config-dir {extra_dir}", "There is no such folder.")])
    schema.register()
    problems: list[Problem] = []
    with initialize_config_dir(str(config_dir.resolve()), job_name="train", version_base="1.3"):
        search_path = [f"hydra.searchpath=[file://{Path(extra_dir).resolve()}]"] if extra_dir else []
        compose(args.config_name or "config", overrides=search_path)  # a broken YAML file shows itself here
        overrides = _parse_overrides(args.overrides, problems)
        good = [o for o in overrides if _check_override(o, problems)]
        if not args.multirun and any(o.is_sweep_override() for o in good):
            swept = next(o for o in good if o.is_sweep_override())
            line = _one_line(swept)
            why = "Several values need a sweep (-m)." if "," in line else "A range or choice needs a sweep (-m)."
            fix = f"python train.py -m {line}   for a sweep\n{swept.key_or_group}=[...]   for one list"
            problems.append(Problem(line, why, fix))
            good = [o for o in good if not o.is_sweep_override()]
        for job in _jobs_to_check(good):
            problems += _check_job(args.config_name or "config", search_path + job, hardware and not args.cfg)
    if problems:
        raise Refusal(list(dict.fromkeys(problems)))


def to_settings(config: DictConfig) -> Settings:
    """Turn a composed config into plain settings objects.

    Merges the plain values into the schema once more, because Hydra's `+key=value` walks past it. Raises Refusal.
    """
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    problems = [_unknown_key(path, value) for path, value in _stray_keys(plain, Settings)]
    if problems:
        raise Refusal(problems)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), plain))
    except OmegaConfBaseException as error:
        raise Refusal([Problem(str(error.full_key or "settings"), first_line(error))]) from error


def _parse_overrides(texts: list[str], problems: list[Problem]) -> list[Override]:
    parsed = []
    for text in texts:
        if _looks_secret(text):
            key = text.partition("=")[0].lstrip("+~")
            problems.append(
                Problem(
                    f"{key}=...",
                    "A secret on the command line would be written to the run folder and to the shell's history.",
                    "set HF_TOKEN or WANDB_API_KEY in the environment, or log in once: hf auth login, wandb login",
                )
            )
            continue
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            hint = "quote the whole override: 'dataset.template=\"Q: {instruction} A: {output}\"'"
            if "=" not in text:
                hint = f"write it as key=value: {text.lstrip('-')}=..."
            problems.append(Problem(text, f"This is not an override. {first_line(error)}", hint))
    return parsed


def _looks_secret(text: str) -> bool:
    key, _, value = text.partition("=")
    words = set(re.split(r"[._\-]+", key.lstrip("+~").lower()))
    return bool(words & SECRET_WORDS) or ("revision" not in key and bool(SECRET_VALUE.search(value)))


def _check_override(override: Override, problems: list[Problem]) -> bool:
    """Whether Hydra can compose with this override; if not, the reason goes to `problems`."""
    key = override.key_or_group
    line = _one_line(override)
    if key.startswith("hydra.") or key.startswith("hydra/"):
        return True
    if override.is_delete():
        problems.append(Problem(line, "Settings cannot be removed, only set.", f"{key}=<value>"))
        return False
    if key in schema.GROUPS:
        return _check_option(override, problems)
    cls, name = _find_field(key)
    if cls is None:
        problems.append(_unknown_key(key, override.input_line.partition("=")[2]))
        return False
    if is_dataclass(_plain_type(cls, name)):
        if isinstance(override._value, dict):
            return True  # checked key by key after composing
        fix = f"{key}.<setting>=..., or one of the options {key}=..."
        problems.append(Problem(line, f"{key} is a group of settings, not a single one.", fix))
        return False
    values = override.sweep_string_iterator() if override.is_sweep_override() else [None]
    for value in values:
        text = f"{key}={value}" if override.is_sweep_override() else line.lstrip("+")
        error = _type_error(text)
        if error:
            problems.append(Problem(text, error, _example(cls, name, key)))
            return False
    return True


def _check_option(override: Override, problems: list[Problem]) -> bool:
    group = override.key_or_group
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override._value]
    for value in values:
        if str(value) == "None":
            problems.append(Problem(f"{group}=null", f"{group} has to be one of {', '.join(known)}."))
            return False
        if str(value) not in known:
            close = difflib.get_close_matches(str(value), known, 1, 0.4)
            fix = f"{group}={close[0]}" if close else ""
            if group == "model":
                fix += f"{chr(10) if fix else ''}model.name={value}   for a hub id or a local folder"
            if group == "dataset":
                fix += f"{chr(10) if fix else ''}dataset=local dataset.path={value}   for a file of your own"
            why = f"There is no such option. {group} can be: {', '.join(known)}."
            problems.append(Problem(f"{group}={value}", why, fix))
            return False
    return True


def _jobs_to_check(overrides: list[Override]) -> list[list[str]]:
    """One job with the first value of every sweep, and one more for each further value."""
    swept = {i: list(o.sweep_string_iterator()) for i, o in enumerate(overrides) if o.is_sweep_override()}
    first = {i: f"{overrides[i].input_line.partition('=')[0]}={values[0]}" for i, values in swept.items() if values}
    base = [first.get(i, o.input_line) for i, o in enumerate(overrides)]
    jobs = [base]
    for i, values in swept.items():
        for value in values[1:]:
            jobs.append([*base[:i], f"{overrides[i].input_line.partition('=')[0]}={value}", *base[i + 1 :]])
    return jobs


def _check_job(config_name: str, overrides: list[str], hardware: bool) -> list[Problem]:
    try:
        config = compose(config_name, overrides=overrides)
        return check_settings(to_settings(config), hardware)
    except Refusal as refusal:
        return refusal.problems
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        return [Problem(" ".join(overrides) or "conf/", f"{first_line(error)} {first_line(cause)}".strip())]


def _find_field(path: str) -> tuple[type | None, str]:
    """The settings class that holds `path` and the field's name; (None, "") where there is no such setting."""
    cls: Any = Settings
    parts = path.split(".")
    for i, part in enumerate(parts):
        names = {f.name for f in fields(cls)}
        if part not in names:
            return None, ""
        kind = _plain_type(cls, part)
        if i == len(parts) - 1 or not is_dataclass(kind):
            free_form = str(kind).startswith("dict")
            return (cls, part) if i == len(parts) - 1 or free_form else (None, "")
        cls = kind
    return None, ""


def _plain_type(cls: type, name: str) -> Any:
    return next(f.type for f in fields(cls) if f.name == name)


def _leaf_keys(cls: type = Settings, prefix: str = "") -> list[str]:
    keys = []
    for f in fields(cls):
        keys += _leaf_keys(f.type, f"{prefix}{f.name}.") if is_dataclass(f.type) else [prefix + f.name]
    return keys


def _stray_keys(plain: dict, cls: type, prefix: str = "") -> list[tuple[str, str]]:
    known = {f.name: f.type for f in fields(cls)}
    stray = []
    for key, value in plain.items():
        if key not in known:
            stray.append((f"{prefix}{key}", str(value)))
        elif is_dataclass(known[key]) and isinstance(value, dict):
            stray += _stray_keys(value, known[key], f"{prefix}{key}.")
    return stray


def _unknown_key(path: str, value: str = "...") -> Problem:
    """The problem of a key that the schema does not have, with the keys it may have been meant to be."""
    group, _, last = path.rpartition(".")
    keys = _leaf_keys()
    siblings = [k for k in keys if k.rpartition(".")[0] == group]
    close = [f"{group}.{COMMON_NAMES[last]}"] if f"{group}.{COMMON_NAMES.get(last)}" in keys else []
    close += difflib.get_close_matches(path, siblings, 2, 0.7)
    close += [k for k in keys if k.rsplit(".", 1)[-1] == last]
    close += difflib.get_close_matches(path, keys, 2, 0.7)
    close = list(dict.fromkeys(close))[:2]
    why = f"There is no setting {path}."
    if close:
        fix = f"{close[0]}={value}"
        why += f" Did you mean {' or '.join(close)}?"
    elif group == "trainer":
        fix = f"trainer.extra.{last}={value}   if it is an option of TRL's SFTConfig"
    else:
        fix = "python train.py --help   lists all settings"
        if siblings:
            why += f" {group} has: {', '.join(k.rsplit('.', 1)[-1] for k in siblings)}."
    return Problem(f"{path}={value}", why, fix)


def _type_error(line: str) -> str:
    """Why `key=value` does not fit the schema, or an empty string."""
    config = OmegaConf.create({"root": OmegaConf.structured(Settings)}).root
    for node in (config.trainer.extra, config.dataset.keep, config.dataset.drop):
        OmegaConf.set_struct(node, False)
    override = OverridesParser.create().parse_override(line)
    value = override.value()
    if isinstance(value, str) and "${" in value:
        return ""  # an interpolation is judged after composing
    try:
        OmegaConf.update(config, override.key_or_group, value, merge=True)
    except OmegaConfBaseException as error:
        return first_line(error)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def _example(cls: type, name: str, key: str) -> str:
    kind = _plain_type(cls, name)
    values = getattr(kind, "__members__", None)
    return f"{key} takes {' | '.join(values)}" if values else f"{key} takes {_type_name(kind)}"


def _type_name(kind: Any) -> str:
    text = getattr(kind, "__name__", str(kind)) if not hasattr(kind, "__args__") else str(kind)
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    return names.get(text, text.replace(" | None", " or null"))


def _one_line(override: Override) -> str:
    return override.input_line or override.key_or_group
