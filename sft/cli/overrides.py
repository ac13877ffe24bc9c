"""One override of the command line, `key=value`: read, and checked against the schema before anything is composed.

What cannot be typed is refused with what was typed, why it cannot, and what to type instead. A secret is never shown.
"""

import difflib
import functools
import os
import re
import shlex
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config import schema
from sft.config.keys import find_field, in_shell, plain_type, typed, unknown_key
from sft.config.schema import Settings
from sft.errors import Problem, first_line
from sft.sweep.checks import LAUNCHERS, SEARCHES
from sft.sweep.grid import list_values

SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd"}

# Options whose names only resemble a secret's.
NOT_SECRET = ("trainer.extra.eos_token", "trainer.extra.pad_token", "lora.extra.trainable_token_indices",
              "lora.extra.rank_pattern.", "lora.extra.alpha_pattern.", "dataset.keep.", "dataset.drop.")  # fmt: skip

# What there is in place of a plugin of Hydra's that is not.
NOT_HERE = {"hydra/launcher": LAUNCHERS, "hydra/sweeper": SEARCHES}

# W&B's old keys are 40 hexadecimal digits; inside a path these are a commit of the hub's cache.
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9-]{16,}|wandb_v1_\w{16,})\b|^['\"]?[0-9a-f]{40}['\"]?$")


def parse_overrides(texts: list[str], problems: list[Problem]) -> list[Override]:
    """The overrides as Hydra reads them, between its initialisation and its end; those that it cannot read go to `problems`."""
    parser = OverridesParser.create()
    parsed = []
    for text in texts:
        if looks_secret(text):
            problems.append(secret(text))
            continue
        try:
            parsed.append(parser.parse_override(text))
            parsed[-1].config_loader = GlobalHydra.instance().config_loader()  # for glob(*)
        except HydraException as error:
            problems.append(_not_an_override(text, error))
    return parsed


def _not_an_override(text: str, error: HydraException) -> Problem:
    """The problem of a text that Hydra cannot read; mostly quotes that the shell took away."""
    key, equals, _ = text.partition("=")
    shown = text.replace("\n", "\\n")
    if not text.strip():
        return Problem(f'"{shown}"', "A word of the command line is empty.", "leave it out: an unset variable may stand there")
    if not equals:
        return Problem(shown, "A setting needs a value.", f"{key.lstrip('-')}=<value>")
    if key.startswith("-"):  # with a space in its value, which argparse takes for no flag
        return Problem(shown, "There is no such flag; settings are written without dashes.", in_shell(shown.lstrip("-")))
    if key[:1] in "'\"":
        return Problem(shown, "The quotes are part of the name here.", shown.strip("'\""))
    cls, name = find_field(key.lstrip("+"))
    if cls is not None and _takes_text(cls, name):
        why = "A text with spaces, braces, quotes or other than ASCII letters needs quotes of its own inside the shell's."
        return Problem(shown, why, _quoted(text))
    hint = "write a text inside brackets or braces in double quotes, and the whole in single quotes:\n"
    return Problem(shown, f"This cannot be read: {first_line(error)}.", hint + f'\'{key}=["a text", "another"]\'')


def _quoted(text: str) -> str:
    """`key=value` as it has to be typed in a shell for the value to arrive as one text."""
    key, _, value = text.partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    value = value.replace("\n", "\\n").replace('"', '\\"')
    return shlex.quote(f'{key}="{value}"')


def needs_sweep(override: Override) -> Problem:
    """The problem of several values without -m: a sweep, a list or a text was meant."""
    line, key = one_line(override), override.key_or_group
    cls, name = find_field(key)
    if cls is not None and str(plain_type(cls, name)).startswith("list"):
        return Problem(line, "Several values need brackets.", f"'{key}=[{line.partition('=')[2]}]'")
    fix = f"python train.py -m {shlex.quote(line)}   for a sweep"
    if cls is not None and _takes_text(cls, name):
        fix = f"{_quoted(line)}   for one text\n{fix}"
    if cls is not None and plain_type(cls, name) is Any and "," in line:
        fix = f"'{key}=[{line.partition('=')[2]}]'   for several files\n{fix}"
    why = "Several values need a sweep (-m)." if "," in line else "A range or choice needs a sweep (-m)."
    return Problem(line, why, fix)


def takes_one(override: Override) -> Problem:
    """The problem of several values for a setting of Hydra's own, over which it does not sweep."""
    key, line = override.key_or_group, one_line(override)
    fix = f"{_quoted(line)}   for one text" if key.endswith("dir") else f"give {key} one value"
    return Problem(line, "Hydra's own settings have one value for all jobs of a sweep.", fix)


def check_override(override: Override, options: dict[str, list[str]], problems: list[Problem]) -> bool:
    """Whether Hydra can compose with this override; if not, the reason goes to `problems`."""
    key = override.key_or_group
    line = one_line(override)
    if key in NOT_HERE and str(override.value()) not in options[key]:
        problems.append(Problem(line, f"There is no {key.partition('/')[2]} {override.value()} here.", NOT_HERE[key]))
        return False
    if key.startswith("hydra.") or key.startswith("hydra/"):
        return True
    if key in options and key not in schema.GROUPS:  # of one's own
        return override.is_delete() or _check_option(override, options[key], problems)
    if override.is_delete():
        fix = f"{key}=none" if "none" in options.get(key, ()) else f"{key}=<value>"
        problems.append(Problem(line, "Settings cannot be removed, only set.", fix))
        return False
    if key in schema.GROUPS:
        return _check_option(override, options[key], problems)
    cls, name = find_field(key)
    if cls is None:
        problems.append(unknown_key(key, override.input_line.partition("=")[2]))
        return False
    if is_dataclass(plain_type(cls, name)):
        tables = _tables(override)
        if tables:
            return _check_mappings(key, tables, plain_type(cls, name), problems)
        members = ", ".join(f.name for f in fields(plain_type(cls, name)))
        fix = f"{key}.<setting>=...   one of {members}"
        problems.append(Problem(line, f"{key} is a group of settings, not a single one.", fix))
        return False
    if override.is_add() and not str(plain_type(cls, find_field(key)[1])).startswith("dict"):
        problems.append(Problem(line, "This setting exists already, so it is set without +.", in_shell(line.lstrip("+"))))
        return False
    values = _values(override, problems)
    for value in values or []:
        text = f"{key}={value}" if override.is_sweep_override() else override.input_line.lstrip("+")
        error = "" if plain_type(cls, name) is Any else _type_error(text)
        if error:
            shown = text.replace("\n", "\\n")
            if "could not be converted" in error:  # OmegaConf's words
                error = f"This is not {_type_name(plain_type(cls, name))}."
            whole = override.is_interval_sweep() and plain_type(cls, name) is int
            fix = f"{key}=int({line.partition('=')[2]})" if whole else _example(cls, name, key)
            if isinstance(value, str) and str(plain_type(cls, name)) == "list[str]":
                fix = f"{typed(key, [value])}   takes a list: [a,b]"
            problems.append(Problem(shown, error, fix))
            return False
    return values is not None


def _values(override: Override, problems: list[Problem]) -> list[Any] | None:
    """Every value of a sweep, or the one value; None, with the problem noted, where they cannot be listed."""
    if not override.is_sweep_override():
        return [override.value()]
    try:
        return list_values(override)
    except HydraException as error:
        why = f"Its values cannot be listed: {first_line(error)}."
        problems.append(
            Problem(
                one_line(override), why, f"{override.key_or_group}=<value>,<value>   or range(1,4) or choice(<value>,<value>)"
            )
        )
        return None


def _tables(override: Override) -> list[dict]:
    """The tables that `samples={num_held_out: 2}` or a sweep over such sets; nothing where a value is none."""
    try:
        swept = override.is_sweep_override() and not override.is_interval_sweep()
        values = list(override.sweep_iterator()) if swept else [override._value]
    except HydraException:
        return []
    return values if all(isinstance(value, dict) for value in values) else []


def _check_mappings(key: str, tables: list[dict], kind: type, problems: list[Problem]) -> bool:
    """The keys of tables, one by one."""
    known = {f.name for f in fields(kind)}
    stray = dict.fromkeys(str(name) for table in tables for name in table if str(name) not in known)
    problems += [unknown_key(f"{key}.{name}") for name in stray]
    return not stray


def _check_option(override: Override, known: list[str], problems: list[Problem]) -> bool:
    """Whether each chosen option of a group exists."""
    group, line = override.key_or_group, one_line(override)
    if isinstance(override._value, dict):
        fix = " ".join(f"{group}.{key}={value}" for key, value in override.value().items())
        problems.append(Problem(line, f"{group}= chooses an option; settings are set one by one.", fix))
        return False
    if isinstance(override._value, list):
        fix = f"python train.py -m {group}={','.join(str(value) for value in override.value())}   for a sweep"
        if group == "tracking":
            fix = f"tracking.trackers=[{','.join(str(value) for value in override.value())}]"
        problems.append(Problem(line, f"A run has one {group}.", fix))
        return False
    if override.is_add() and group in schema.GROUPS:
        problems.append(Problem(line, f"{group} has an option already, so it is set without +.", in_shell(line.lstrip("+"))))
        return False
    values = _values(override, problems)
    if values is None:
        return False
    for value in values:
        if str(value) == "None":
            fix = f"{group}={'none' if 'none' in known else known[0]}"
            problems.append(Problem(f"{group}=null", f"{group} has to be one of {', '.join(known)}.", fix))
            return False
        if str(value) not in known:
            last = str(value).rpartition("/")[2]
            close = [option for option in known if option.rpartition("/")[2] == last]
            close += difflib.get_close_matches(str(value), known, 1, 0.4)
            named = f"+{group}" if override.is_add() else group
            fix = f"{named}={close[0]}" if close else ""
            if group == "model":
                name = value if "/" in str(value) or os.path.isdir(str(value)) else "<owner/name>"
                fix += f"\nmodel.name={name}   for a hub id or a local folder"
            if group == "dataset":
                path = value if "." in str(value) or os.path.exists(str(value)) else "<file>"
                fix += f"\ndataset=local dataset.path={path}   for a file of your own"
            fix = fix.strip() or f"{named}={known[0]}"
            why = f"There is no such option. {group} can be: {', '.join(known)}."
            problems.append(Problem(f"{group}={value}", why, fix))
            return False
    return True


def is_known(key: str) -> bool:
    """Whether a group, a setting or something of Hydra's own has this name."""
    return key in schema.GROUPS or key.startswith("hydra") or find_field(key)[0] is not None


def _takes_text(cls: type, name: str) -> bool:
    return str(plain_type(cls, name)) in ("<class 'str'>", "str | None", "dict[str, str]", "typing.Any")


def _type_error(line: str) -> str:
    """Why `key=value` does not fit the schema, or an empty string."""
    config = _scratch()
    for node in _of_any_keys(config):
        node.clear()  # what was tried before decides what fits now
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


@functools.cache
def _scratch() -> DictConfig:
    """The schema, to try values on. Making it takes longer than everything else about an override."""
    config = OmegaConf.create({"root": OmegaConf.structured(Settings)}).root
    for node in _of_any_keys(config):
        OmegaConf.set_struct(node, False)
    return config


def _of_any_keys(config: DictConfig) -> tuple[DictConfig, ...]:
    return config.trainer.extra, config.lora.extra, config.dataset.keep, config.dataset.drop


def _example(cls: type, name: str, key: str) -> str:
    kind = plain_type(cls, name)
    options = [list(k.__members__) for k in getattr(kind, "__args__", (kind,)) if hasattr(k, "__members__")]
    if not options:
        default = next(f.default for f in fields(cls) if f.name == name)
        plain = isinstance(default, int | float | str) and default != ""
        return f"{typed(key, default)}   takes {_type_name(kind)}" if plain else f"{key} takes {_type_name(kind)}"
    return f"{key} takes {' | '.join(options[0])}" + (" or null" if hasattr(kind, "__args__") else "")


def _type_name(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    names |= {
        "int | str": "a whole number or auto",
        "list[str]": "a list: [a,b]",
        "dict[str, str]": 'pairs: {column: "text"}',
        "dict[str, typing.Any]": "pairs: {name: value}",
    }
    plain = text.removesuffix(" | None")
    return names.get(plain, plain) + (" or null" if plain != text else "")


def one_line(override: Override) -> str:
    """The override as typed, its line breaks spelled out."""
    return (override.input_line or override.key_or_group).replace("\n", "\\n")


def looks_secret(text: str) -> bool:
    """Whether a word is named like a secret or holds what looks like one."""
    key, equals, value = text.partition("=")
    key, value = key.lstrip("+~"), value if equals else key
    words = set(re.split(r"[._\-]+", key.lower()))
    named = bool(words & SECRET_WORDS) and not key.startswith(NOT_SECRET)
    return named or bool("revision" not in key and SECRET_VALUE.search(value))


def secret(text: str) -> Problem:
    """The problem of a secret, which is not shown."""
    key = text.partition("=")[0].lstrip("+~")
    return Problem(
        "a word of the command line" if SECRET_VALUE.search(key) else f"{key}=...",
        "A secret on the command line would be written to the run folder and to the shell's history.",
        "set HF_TOKEN or WANDB_API_KEY in the environment, or log in once: hf auth login, wandb login",
    )
